"""Structured log lines.

One event a line, as a JSON object or as text. Prompts and keys are never logged: `fingerprint` stands for a prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from math import inf
from typing import Any, TextIO

_FIELDS = "streamflow_fields"
_MINUTE_S = 60.0


class EventLogger:
    """A standard logger whose lines are an event's name and fields: `log.info("admitted", job=id, images=4)`."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, /, *, error: BaseException | None = None, **fields: object) -> None:
        """`error` adds its traceback."""
        self._write(logging.ERROR, event, fields, error)

    def _write(self, level: int, event: str, fields: dict[str, object], error: BaseException | None = None) -> None:
        self._logger.log(level, "%s", event, extra={_FIELDS: fields}, exc_info=error)


def get_logger(name: str) -> EventLogger:
    """The logger of a module; lines of other libraries go through the standard one and look the same."""
    return EventLogger(logging.getLogger(name))


class Told:
    """What was said last of something that goes on and on, so that only news of it is said."""

    def __init__(self) -> None:
        self._last = ""

    def is_news(self, reason: object) -> bool:
        """Whether it is for another reason than the last time."""
        last, self._last = self._last, str(reason)
        return self._last != last

    def over(self) -> bool:
        """All is well; whether that is news."""
        return self.is_news("")


class Sparing:
    """At most so many lines of one kind in a minute, since others decide how often it happens.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, *, most: int = 10, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._since_s, self._said, self._left_out = -inf, 0, 0

    def turn(self) -> int | None:
        """How many were left out before this one; None where it is left out itself."""
        now_s = self._clock()
        if now_s - self._since_s >= _MINUTE_S:
            self._since_s, self._said = now_s, 0
        if self._said >= self._most:
            self._left_out += 1
            return None
        self._said += 1
        left_out, self._left_out = self._left_out, 0
        return left_out


def configure_logging(*, level: str, log_format: str, service: str, stream: TextIO | None = None) -> None:
    """Sends the process's log to `stream` (standard error by default); called once, by a `__main__`.

    Args:
        level: debug, info, warning or error.
        log_format: json or text.
        service: gateway, encoder ...; part of every line.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if log_format == "json" else _TextFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def fingerprint(text: str) -> str:
    """A short hash that stands for a prompt in a log line."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TextFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {name}={value}" for name, value in getattr(record, _FIELDS, {}).items())
        # A line break in a value must not start a line that looks like another event.
        event = f"{record.getMessage()}{fields}".replace("\n", "\\n").replace("\r", "\\r")
        line = f"{time} {record.levelname.lower():7} {self._service}: {event}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info and record.exc_info[0] else line
