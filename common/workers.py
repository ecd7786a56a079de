"""Several processes on one port: fork, watch, restart, stop. The kernel spreads connections over them (SO_REUSEPORT).

The supervisor runs no event loop and serves nothing. Each worker counts its metrics in its own row of a shared map.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, MutableSequence
from typing import cast

from common.errors import StartupError

log = logging.getLogger("predlog.workers")

RESTART_SECONDS = 0.5
EARLY_SECONDS = 10.0  # a worker that fails so soon after the start has a cause that a restart does not mend
KILL_GRACE_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def shared_rows(rows: int, floats: int) -> list[MutableSequence[float]]:
    """Rows of floats that processes forked from this one share."""
    view = memoryview(mmap.mmap(-1, rows * floats * 8)).cast("d")
    return [cast(MutableSequence[float], view[row * floats : (row + 1) * floats]) for row in range(rows)]


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind the port that the workers will share, without listening; raises StartupError when somebody else has it.

    Keep the socket: it holds the port (any free one for 0) while workers come and go.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Without SO_REUSEPORT first: nobody may be here, not even another predlog.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
        shared = socket.socket(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((host, port))
        return shared
    except (OSError, UnicodeError) as error:  # UnicodeError: no name at all, to the codec of host names
        why = getattr(error, "strerror", None) or error
        raise StartupError(f"cannot listen on {host}:{port}: {why}; stop the other program, or set HTTP_PORT") from None


def supervise(count: int, work: Callable[[int, int, bool], int], shutdown_seconds: float) -> int:
    """Fork `count` workers, each running `work(index, alive_fd, replaces)` to its exit code, until a signal stops all.

    `alive_fd` becomes readable when the supervisor is gone, however it went. A worker that dies is replaced. One that
    ends by itself within EARLY_SECONDS of the start ends everything with its exit code. SIGHUP is passed on.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    alive_read, alive_write = os.pipe()
    began = time.monotonic()
    workers: dict[int, int] = {}

    def fork(index: int, replaces: bool) -> None:
        pid = os.fork()
        if pid:
            workers[pid] = index
            return
        os.close(alive_write)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        code = 1
        try:
            code = work(index, alive_read, replaces)
        except BaseException:
            log.exception("worker %d failed", index)
        finally:
            os._exit(code)

    for index in range(count):
        fork(index, replaces=False)
    exit_code, kill_at = 0, None
    due: list[tuple[float, int]] = []  # restarts: when, which
    while workers or (due and kill_at is None):
        wake = [when for when, _ in due] if kill_at is None else [kill_at]
        info = signal.sigtimedwait(_SIGNALS, max(0.0, min(wake, default=time.monotonic() + 60) - time.monotonic()))
        now = time.monotonic()
        if info is not None and info.si_signo == signal.SIGHUP:
            _tell(workers, signal.SIGHUP)
        elif info is not None and info.si_signo in (signal.SIGTERM, signal.SIGINT) and kill_at is None:
            kill_at = now + shutdown_seconds + KILL_GRACE_SECONDS
            _tell(workers, signal.SIGTERM)
        for pid, index, code in _reap(workers):
            if kill_at is not None:
                exit_code = exit_code or code
            elif code > 0 and now - began < EARLY_SECONDS:
                exit_code, kill_at = code, now + shutdown_seconds + KILL_GRACE_SECONDS
                _tell(workers, signal.SIGTERM)
            else:
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                log.error("worker %d (pid %d) ended %s; starting another", index, pid, how)
                due.append((now + RESTART_SECONDS, index))
        if kill_at is None:
            for when, index in [item for item in due if item[0] <= now]:
                due.remove((when, index))
                fork(index, replaces=True)
        elif now >= kill_at and workers:
            log.error("%d worker(s) did not stop in time; killed", len(workers))
            _tell(workers, signal.SIGKILL)
            kill_at, exit_code = now + 60, exit_code or 1
    return max(exit_code, 0)


def _tell(workers: dict[int, int], signum: signal.Signals) -> None:
    for pid in workers:
        os.kill(pid, signum)


def _reap(workers: dict[int, int]) -> list[tuple[int, int, int]]:
    """Take out of `workers` all that have ended, before any is acted on: a pid that was reaped must not be signalled.

    Each as (pid, index, exit code, or minus the signal's number).
    """
    ended = []
    for pid in list(workers):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended.append((pid, workers.pop(pid), os.waitstatus_to_exitcode(status)))
    return ended
