"""Log lines and counters."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from streamflow.telemetry import Counters, Sparing, Told, configure_logging, fingerprint, get_logger


@pytest.fixture
def log_to() -> Iterator[Callable[[str], io.StringIO]]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def start(log_format: str) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(level="info", log_format=log_format, service="gateway", stream=stream)
        return stream

    yield start
    root.handlers[:], root.level = handlers, level


def test_an_event_is_one_json_object_a_line(log_to):
    stream = log_to("json")
    get_logger("a.b").info("admitted", job="r-1", images=4, note="two\nlines")
    get_logger("a.b").debug("not shown")
    (line,) = stream.getvalue().splitlines()
    read = json.loads(line)
    assert read.pop("time")
    assert read == {
        "level": "info",
        "service": "gateway",
        "logger": "a.b",
        "event": "admitted",
        "job": "r-1",
        "images": 4,
        "note": "two\nlines",
    }


def test_an_error_brings_its_traceback(log_to):
    stream = log_to("json")
    get_logger("x").error("failed", error=ZeroDivisionError("by zero"))
    assert "ZeroDivisionError: by zero" in json.loads(stream.getvalue())["traceback"]


def test_text_cannot_forge_a_line(log_to):
    stream = log_to("text")
    get_logger("x").warning("refused", id="a\n12:00:00 info gateway: all is well")
    assert len(stream.getvalue().splitlines()) == 1
    assert "warning" in stream.getvalue()


def test_lines_of_libraries_look_the_same(log_to):
    stream = log_to("json")
    logging.getLogger("other").warning("%d of %d", 1, 2)
    assert json.loads(stream.getvalue())["event"] == "1 of 2"


def test_a_prompt_shows_as_its_fingerprint():
    assert fingerprint("a red circle") == fingerprint("a red circle") != fingerprint("a blue circle")
    assert len(fingerprint("x" * 10_000)) == 12


def test_counters_count_from_any_thread():
    counters = Counters()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: counters.add("images_total", 2), range(2000)))
    assert counters.snapshot() == {"images_total": 4000}


def test_what_goes_on_is_told_when_it_is_news():
    told = Told()
    assert not told.over()
    said = [told.is_news(reason) for reason in ("away", "away", "wrong password", "wrong password")]
    assert said == [True, False, True, False]
    assert told.over()
    assert told.is_news("wrong password")


def test_only_so_many_lines_a_minute_and_how_many_were_left_out():
    now = [0.0]
    lines = Sparing(most=2, clock=lambda: now[0])
    assert [lines.turn() for _ in range(5)] == [0, 0, None, None, None]
    now[0] = 60.0
    assert [lines.turn() for _ in range(3)] == [3, 0, None]
