"""A process from start to end: event loop, signals, logging, exit codes. Nothing here knows what the process does."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TextIO

import uvloop

from common.errors import Fatal

log = logging.getLogger("predlog")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}


def escaped(text: str) -> str:
    """Text with its control characters spelled out, so that nobody's input can forge a log line or drive a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class TextFormatter(logging.Formatter):
    """One line an event, for people."""

    def __init__(self, prog: str, colour: bool) -> None:
        super().__init__()
        self._prog = prog
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"{when}.{int(record.msecs):03}Z {self._prog} {record.levelname.lower()} {escaped(record.getMessage())}"
        if record.exc_info:
            line += "\n" + "\n".join(map(escaped, self.formatException(record.exc_info).splitlines()))
        colour = _COLOURS.get(record.levelno) if self._colour else None
        return f"{colour}{line}\x1b[0m" if colour else line


class JsonFormatter(logging.Formatter):
    """One JSON object an event, for machines."""

    def __init__(self, prog: str) -> None:
        super().__init__()
        self._prog = prog

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{when}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "process": self._prog,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(prog: str, level: str, fmt: str, stream: TextIO | None = None) -> None:
    """Log to stderr. aiormq's own account of a lost connection is left out: we say it in one line."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(prog) if fmt == "json" else TextFormatter(prog, stream.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("aiormq", "aiormq.connection", "aiormq.channel"):
        logging.getLogger(name).setLevel(logging.CRITICAL if level != "debug" else logging.DEBUG)


def run(prog: str, main: Callable[[], Coroutine[Any, Any, int | None]]) -> int:
    """Run `main` on uvloop to its end; the exit code. A Fatal ends it with its one line on stderr and no traceback."""
    # A batch of events is many small objects that hold no cycle: by default the collector would look at them again and
    # again while they live, for a tenth of the consumer's time.
    gc.set_threshold(20_000, 20, 50)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main()) or 0
    except Fatal as error:
        return fail(prog, error)
    except KeyboardInterrupt:
        return 130


def fail(prog: str, error: Fatal) -> int:
    """Say why the process ends, on one line; the exit code."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.critical("%s", error)
        return error.exit_code
    print(f"{prog}: {escaped(str(error))}", file=sys.stderr, flush=True)
    return error.exit_code


def raise_file_limit() -> int:
    """Let this process open as many files as it may; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def on_stop() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. A second SIGINT ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupted() -> None:
        if stop.is_set():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel, and wait until all have ended, however they did."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_of(stop: asyncio.Event, *tasks: asyncio.Task[Any]) -> None:
    """Wait for `stop`, or for the first of `tasks` to end, and raise its exception: none has an end of its own."""
    stopping = asyncio.ensure_future(stop.wait())
    done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in done - {stopping}:
        task.result()
