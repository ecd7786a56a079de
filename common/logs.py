"""Log records as lines: text for people, JSON for machines. Nothing here decides what is logged."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import TextIO

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}


def escaped(text: str) -> str:
    """Escape control characters, so that input can neither forge a log line nor drive a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _when(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"


class TextFormatter(logging.Formatter):
    """One line for each record, for people."""

    def __init__(self, prog: str, colour: bool) -> None:
        super().__init__()
        self._prog = prog
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_when(record)} {self._prog} {record.levelname.lower()} {escaped(record.getMessage())}"
        if record.exc_info:
            line += "\n" + "\n".join(map(escaped, self.formatException(record.exc_info).splitlines()))
        colour = _COLOURS.get(record.levelno) if self._colour else None
        return f"{colour}{line}\x1b[0m" if colour else line


class JsonFormatter(logging.Formatter):
    """One JSON object for each record, for machines."""

    def __init__(self, prog: str) -> None:
        super().__init__()
        self._prog = prog

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "process": self._prog,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(prog: str, level: str, fmt: str, stream: TextIO | None = None) -> None:
    """Log to `stream` (stderr). Drop aiormq's records unless `level` is debug: predlog logs a loss in one line."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(prog) if fmt == "json" else TextFormatter(prog, stream.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("aiormq", "aiormq.connection", "aiormq.channel"):
        logging.getLogger(name).setLevel(logging.CRITICAL if level != "debug" else logging.DEBUG)
