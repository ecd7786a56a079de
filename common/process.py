"""A process from start to end: event loop, signals, exit codes. Nothing here knows what the process does."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import uvloop

from common.errors import Fatal, StartupError
from common.logs import JsonFormatter, escaped

log = logging.getLogger("predlog")

COLLECT_SECONDS = 0.1
NEW_LEAST = 10_000  # objects that make a collection worth it
NEW_MOST = 30_000  # objects that one may look at: 8 ms
FULL_SECONDS = 60.0  # at least, between two collections of everything
QUIET_SHARE = 0.03  # of one CPU

_FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of glibc's malloc.h


class Collector:
    """The garbage collector, in steps that hold up the event loop for some milliseconds each.

    Events are many small objects that form no cycle, so that a collection finds nothing among them, and it takes a
    quarter of a microsecond for each. Python's own rules let hundreds of thousands gather and look at all of them at
    once; they differ between its versions (3.14.0 to 3.14.4 collect in increments). So Python never begins one: this
    looks at what is new if that is not too much, and at everything in a moment in which the process has little to do:
    with 8,000 connections for 120 ms, and for a thousandth of the time at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        gc.disable()
        gc.freeze()  # what was imported lives as long as the process: without it, a full collection is 15 ms shorter
        self._loop = loop
        self._longest = 0.0
        self._cpu = 0.0
        self._full_at = loop.time() + FULL_SECONDS
        self.tick()

    def tick(self) -> None:
        new, cpu = gc.get_count()[0], time.process_time()
        is_quiet, self._cpu = cpu - self._cpu < QUIET_SHARE * COLLECT_SECONDS, cpu
        if new > NEW_MOST:  # a large batch: to the old objects, unseen
            gc.freeze()
            gc.unfreeze()
        elif new > NEW_LEAST:
            self._collect(0)
        elif is_quiet and self._loop.time() > self._full_at:
            self._full_at = self._loop.time() + max(FULL_SECONDS, 1000 * self._collect(2))
        self._loop.call_later(COLLECT_SECONDS, self.tick)

    def _collect(self, generation: int) -> float:
        began = time.perf_counter()
        gc.collect(generation)
        seconds = time.perf_counter() - began
        if seconds > self._longest:
            self._longest = seconds
            log.debug("a garbage collection took %.1f ms, the longest so far", seconds * 1000)
        return seconds


def run(prog: str, main: Callable[[], Coroutine[Any, Any, int | None]]) -> int:
    """Run `main` on uvloop to its end; return the exit code. A Fatal ends it with one line and no traceback."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the Runner replaces: it cancels `main`
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            Collector(runner.get_loop())
            try:
                return runner.run(main()) or 0
            finally:  # closing the loop would restore SIGHUP's default, which ends a process
                runner.get_loop().remove_signal_handler(signal.SIGHUP)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
    except Fatal as error:
        return fail(prog, error)
    except KeyboardInterrupt:
        return 130
    except (Exception, asyncio.CancelledError):
        log.critical("a fault in predlog ends this process", exc_info=True)
        return 1


def keep_freed_memory() -> None:
    """Make malloc keep freed memory, in one arena for all threads. Do nothing without glibc.

    By default glibc maps each buffer of 128 KB or more, which the kernel clears page by page, and unmaps it: a quarter
    of the CPU for events with images. At most 64 MB are kept at the top of the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_ARENA_MAX, 1)):
            mallopt(option, value)


def fail(prog: str, error: Fatal) -> int:
    """Print or log on one line why the process ends; return its exit code."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.critical("%s", error)
        return error.exit_code
    print(f"{prog}: {escaped(str(error))}", file=sys.stderr, flush=True)
    return error.exit_code


def read_file(path: str) -> str:
    """Return the text of a small file. Raise OSError, or UnicodeError if it is not UTF-8."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def raise_file_limit() -> int:
    """Raise the limit on open files to its hard limit; return the new limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def inherited_socket(environ: Mapping[str, str], pid: int) -> socket.socket | None:
    """Return the listening socket that systemd passes on (sd_listen_fds(3)), which outlives a restart, or None.

    Raise StartupError unless it is exactly one listening TCP socket.
    """
    if environ.get("LISTEN_PID") != str(pid) or environ.get("LISTEN_FDS", "0") == "0":
        return None
    if environ["LISTEN_FDS"] != "1":
        raise StartupError(f"LISTEN_FDS is {environ['LISTEN_FDS']}, but must be 1: see the .socket unit")
    try:
        found = socket.socket(fileno=_FIRST_INHERITED)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartupError(f"LISTEN_FDS is set, but file descriptor 3 is not a socket: {error.strerror}") from None
    if not listens or found.family not in (socket.AF_INET, socket.AF_INET6):
        raise StartupError("LISTEN_FDS is set, but file descriptor 3 is not a listening TCP socket")
    found.set_inheritable(False)
    return found


def on_stop(alive_fd: int | None = None) -> asyncio.Event:
    """Return an event that is set by SIGTERM, SIGINT, and the end of the supervisor (`alive_fd` becomes readable).

    A second SIGINT ends the process at once.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupted() -> None:
        if stop.is_set():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        stop.set()

    def orphaned(fd: int) -> None:
        loop.remove_reader(fd)
        stop.set()

    if alive_fd is not None:
        loop.add_reader(alive_fd, orphaned, alive_fd)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel `tasks` and wait until all have ended. Log their exceptions, except the one that is being handled."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Fatal) and result is not sys.exception():
            log.error("%s", result)
        elif isinstance(result, Exception) and result is not sys.exception():
            log.error("a fault in predlog has ended a task", exc_info=result)


async def first_of(stop: asyncio.Event, *tasks: asyncio.Task[Any]) -> None:
    """Wait for `stop`, or until one of `tasks`, which have no end, fails; then raise its exception."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for task in done - {stopping}:
        task.result()
