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
    """Let the garbage collector look less often, and never at what lives as long as the process.

    A batch of events is many small objects that hold no cycle: by default the collector would look at them again and
    again while they live, for a tenth of the consumer's time. A full collection keeps the loop from everyone; without
    the modules it is shorter by 15 ms.
    """
    gc.set_threshold(20_000, 20, 50)
    gc.freeze()


def run(prog: str, main: Callable[[], Coroutine[Any, Any, int | None]]) -> int:
    """Run `main` on uvloop to its end; the exit code. A Fatal ends it with its one line on stderr and no traceback."""
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
    """Let malloc keep what is freed, and all threads share it. Without glibc: nothing.

    By default each buffer of 128 KB or more is taken from the kernel, cleared page by page, and given back: for events
    with images a quarter of the CPU. It keeps 64 MB at most at its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_ARENA_MAX, 1)):
            mallopt(option, value)


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


def inherited_socket(environ: Mapping[str, str], pid: int) -> socket.socket | None:
    """The listening socket that systemd holds for us, or None (sd_listen_fds(3)): it outlives a restart.

    Raise StartupError for what is not one TCP socket that listens.
    """
    if environ.get("LISTEN_PID") != str(pid) or environ.get("LISTEN_FDS", "0") == "0":
        return None
    if environ["LISTEN_FDS"] != "1":
        raise StartupError(f"LISTEN_FDS is {environ['LISTEN_FDS']}, but one socket is taken: see the .socket unit")
    try:
        found = socket.socket(fileno=_FIRST_INHERITED)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartupError(f"LISTEN_FDS is set, but file 3 is no socket: {error.strerror}") from None
    if not listens or found.family not in (socket.AF_INET, socket.AF_INET6):
        raise StartupError("LISTEN_FDS is set, but file 3 is no TCP socket that listens")
    found.set_inheritable(False)
    return found


def on_stop(alive_fd: int | None = None) -> asyncio.Event:
    """An event that SIGTERM and SIGINT set, and the end of the supervisor, when `alive_fd` becomes readable.

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
