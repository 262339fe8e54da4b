"""Structured log lines.

One event a line, as a JSON object or as text. Prompts and keys are never logged: `fingerprint` stands for a prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

_FIELDS = "streamflow_fields"


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
