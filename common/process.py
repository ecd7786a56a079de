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
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import uvloop

from common.errors import Fatal, StartupError
from common.logs import JsonFormatter, escaped

log = logging.getLogger("predlog")

_FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of glibc's malloc.h


def tune_collector() -> None:
    """Run the garbage collector less often, and never over what lives as long as the process.

    A batch of events is many small objects that form no cycle. With the default thresholds the collector would scan
    them repeatedly, for a tenth of the consumer's time. A full collection blocks the event loop; without the imported
    modules it is 15 ms shorter.
    """
    gc.set_threshold(20_000, 20, 50)
    gc.freeze()


def run(prog: str, main: Callable[[], Coroutine[Any, Any, int | None]]) -> int:
    """Run `main` on uvloop to its end; return the exit code. A Fatal ends it with one line and no traceback."""
    tune_collector()
    keep_freed_memory()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main()) or 0
    except Fatal as error:
        return fail(prog, error)
    except KeyboardInterrupt:
        return 130


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
    """Cancel `tasks` and wait until all have ended. Ignore their results and exceptions."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_of(stop: asyncio.Event, *tasks: asyncio.Task[Any]) -> None:
    """Wait for `stop`, or until one of `tasks` fails; then raise its exception. The tasks never end by themselves."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for task in done - {stopping}:
        task.result()
