"""A process from start to end: event loop, signals, exit codes. Independent of what the process does."""

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
from common.logs import escaped

log = logging.getLogger("predlog")

TICK_SECONDS = 0.1
COLLECT_SECONDS = 10.0  # between two collections, unless NEW_OBJECTS come sooner
NEW_OBJECTS = 10_000
MOST_OBJECTS = 40_000  # that one collection looks at, in 10 ms

_FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of glibc's malloc.h


class Collector:
    """The garbage collector, which holds up the event loop for about 10 ms at most.

    Events and connections are many small objects that form no cycle. Python's own rules, which differ between its
    versions, let hundreds of thousands gather, and look at all of them at once. So automatic collection is off. Objects
    that are too many for one collection are frozen: none is looked at again, and each is freed once nothing refers to
    it. Only a cycle that was in use at that moment stays, such as that of a connection to the broker.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        gc.disable()
        gc.freeze()  # what was imported lives as long as the process
        self._loop = loop
        self._due = self._longest_seconds = 0.0
        self.tick()

    def tick(self) -> None:
        new, now = gc.get_count()[0], self._loop.time()
        if new > NEW_OBJECTS or now > self._due:
            self._due = now + COLLECT_SECONDS
            if new > MOST_OBJECTS or len(gc.get_objects()) > MOST_OBJECTS:
                gc.freeze()
            else:
                self._collect()
        self._loop.call_later(TICK_SECONDS, self.tick)

    def _collect(self) -> None:
        began = time.perf_counter()
        gc.collect()
        seconds = time.perf_counter() - began
        if seconds > self._longest_seconds:
            self._longest_seconds = seconds
            log.debug("the longest garbage collection so far took %.1f ms", 1000 * seconds)


def run(prog: str, main: Callable[[], Coroutine[Any, Any, int | None]]) -> int:
    """Run `main` on uvloop to its end; return the exit code. A Fatal ends it with one line and no traceback."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the Runner replaces it with one that cancels `main`
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
        log.critical("a bug in predlog ends this process", exc_info=True)
        return 1


def keep_freed_memory() -> None:
    """Make malloc keep freed memory, in one arena for all threads. Do nothing without glibc.

    By default glibc maps and unmaps each buffer of 128 KB or more, and the kernel clears it page by page. For events
    with images, that took a quarter of the CPU. At most 64 MB are kept at the top of the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_ARENA_MAX, 1)):
            mallopt(option, value)


def fail(prog: str, error: Fatal) -> int:
    """Print or log on one line why the process ends; return its exit code."""
    if any(getattr(handler.formatter, "in_json", False) for handler in logging.getLogger().handlers):
        log.critical("%s", error)
    else:
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
    try:
        found = socket.socket(fileno=_FIRST_INHERITED)
        is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        is_listening = False
    if environ["LISTEN_FDS"] != "1" or not is_listening or found.family not in (socket.AF_INET, socket.AF_INET6):
        raise StartupError("LISTEN_FDS must be 1, and file descriptor 3 a listening TCP socket: see the .socket unit")
    found.set_inheritable(False)
    return found


def on_stop(alive_fd: int | None = None) -> asyncio.Event:
    """Return an event that is set by SIGTERM, SIGINT, or the end of the supervisor (`alive_fd` becomes readable).

    From then on, SIGINT ends the process at once.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def begin_stop() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process at once
        if alive_fd is not None:
            loop.remove_reader(alive_fd)

    if alive_fd is not None:
        loop.add_reader(alive_fd, begin_stop)
    loop.add_signal_handler(signal.SIGTERM, begin_stop)
    loop.add_signal_handler(signal.SIGINT, begin_stop)
    return stop


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel `tasks` and wait until all have ended. Log their exceptions, except the one that is being handled."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and result is not sys.exception():
            log.error("a task failed: %s", result, exc_info=None if isinstance(result, Fatal) else result)


async def first_of(stop: asyncio.Event, *tasks: asyncio.Task[Any]) -> None:
    """Wait until `stop` is set, or until one of the endless `tasks` fails; then raise its exception."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for task in done - {stopping}:
        task.result()
