"""What a serving process writes to standard error: lines for people, or one JSON object a line; one line a request.

Knows formats and levels. What is said of a request is handed in, and never holds a prompt, an answer or a key.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO, cast

from rich.console import Console

logger = logging.getLogger("server.serve")
access_logger = logging.getLogger("server.access")
_OWN = ("server", "runtime", "cache")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # probes and scrapers: seconds apart, for ever
_FIELDS = "fields"  # where a record carries what is more than its message


def set_up(as_json: bool, stream: TextIO | None = None) -> None:
    """Sends the log of the whole process to `stream` (standard error); our own from INFO, that of others from WARNING.

    Replaces what was set up before.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in _OWN:
        logging.getLogger(name).setLevel(logging.INFO)


def console(as_json: bool) -> Console:
    """Where the command speaks of loading and readiness: standard error as it is, or as lines of the JSON log."""
    if not as_json:
        return Console(stderr=True)
    lines = cast(TextIO, _Lines(logger))
    return Console(file=lines, width=10_000, force_terminal=False, no_color=True)


def log_request(
    *, request_id: str, method: str, path: str, status: int | None, seconds: float, cost: Mapping[str, Any]
) -> None:
    """One line for a request that is over. status None: the connection ended before there was one."""
    if path in _QUIET_PATHS:
        return
    fields = {"request_id": request_id, "method": method, "path": path, "status": status, "seconds": round(seconds, 4)}
    access_logger.info("request", extra={_FIELDS: {**fields, **cost}})


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message", …}, and "exception" with the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        trace = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({**head, **_fields(record), **trace}, default=str)


class TextFormatter(logging.Formatter):
    """`time level message key=value …`, and the traceback below where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record) + "".join(f" {k}={_plain(v)}" for k, v in _fields(record).items())


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(record, _FIELDS, {})
    return found


def _plain(value: Any) -> str:
    """A value without blanks or line ends: a path or an id comes from outside, and must not write lines of its own."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text if text.isprintable() and " " not in text else json.dumps(text)


class _Lines(io.TextIOBase):
    """A file whose lines are records."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.info("%s", line.rstrip())
        return len(text)
