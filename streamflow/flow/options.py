"""Options of samplers: from the text in a sampler string to values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamflow.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a sampler.

    Attributes:
        summary: what it does, and its default.
        allowed: its values, as users see them.
        read: from its text to its value; raises ValueError.
    """

    summary: str
    allowed: str
    read: Callable[[str], Any]


def read_options(text: str, given: str | None, known: Mapping[str, Option]) -> dict[str, Any]:
    """The values of `given`, such as "windows=4,exact=true".

    Args:
        text: the whole sampler string, for errors.

    Raises:
        InvalidRequestError: an option that is not known or stands twice, or a value that is not allowed.
    """
    values: dict[str, Any] = {}
    for item in given.split(",") if given else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in known or key in values:
            allowed = "the options " + ", ".join(known) if known else "no options for this sampler"
            raise InvalidRequestError("sampler", text, allowed, "write them once each, as name[option=value]")
        try:
            values[key] = known[key].read(value)
        except ValueError as error:
            raise InvalidRequestError("sampler", text, f"{key} = {known[key].allowed}") from error
    return values


def number(summary: str, least: float, most: float) -> Option:
    return Option(summary, f"{least:g} to {most:g}", lambda text: _within(float(text), least, most))


def integer(summary: str, least: int, most: int) -> Option:
    return Option(summary, f"{least} to {most}", lambda text: int(_within(int(text), least, most)))


def choice(summary: str, values: Mapping[str, Any]) -> Option:
    def read(text: str) -> Any:
        if text not in values:
            raise ValueError(text)
        return values[text]

    return Option(summary, " or ".join(values), read)


def _within(value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise ValueError(value)
    return value
