"""Log records as lines: text for people, JSON for machines."""

from __future__ import annotations

import json
import logging
import re
import time

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def escaped(text: str) -> str:
    """Escape control characters, so that input can neither forge a log line nor drive a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _when(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"


class LineFormatter(logging.Formatter):
    """One line for each record: text for people, or JSON for machines. A traceback adds lines to text."""

    def __init__(self, prog: str, in_json: bool) -> None:
        super().__init__()
        self._prog = prog
        self.in_json = in_json

    def format(self, record: logging.LogRecord) -> str:
        level, message = record.levelname.lower(), record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.in_json:
            entry = {"time": _when(record), "level": level, "process": self._prog, "logger": record.name}
            return json.dumps(entry | {"message": message} | ({"exception": trace} if trace else {}))
        lines = [f"{_when(record)} {self._prog} {level} {message}", *trace.splitlines()]
        return "\n".join(map(escaped, lines))


def set_up_logging(prog: str, level: str, fmt: str) -> None:
    """Log to stderr. Drop aiormq's records unless `level` is debug: predlog logs each loss itself, in one line."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(prog, fmt.lower() == "json"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("aiormq", "aiormq.connection", "aiormq.channel"):
        logging.getLogger(name).setLevel(logging.DEBUG if level.lower() == "debug" else logging.CRITICAL)
