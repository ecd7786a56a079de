"""Several processes on one port: fork, watch, restart, stop. The kernel spreads connections over them (SO_REUSEPORT).

The supervisor runs no event loop and serves nothing. Each worker counts its metrics in its own row of a shared map.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, MutableSequence
from typing import cast

from common.errors import StartupError

log = logging.getLogger("predlog.workers")

RESTART_SECONDS = 0.5  # a worker that replaces another waits this long first
EARLY_SECONDS = 10.0  # a worker that fails this soon after the start has a cause that a restart does not fix
KILL_GRACE_SECONDS = 2.0
IDLE_SECONDS = 60.0  # between two checks when nothing happens
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def shared_rows(rows: int, floats: int) -> list[MutableSequence[float]]:
    """Return rows of floats that this process shares with its forks."""
    view = memoryview(mmap.mmap(-1, rows * floats * 8)).cast("d")
    return [cast(MutableSequence[float], view[row * floats : (row + 1) * floats]) for row in range(rows)]


def reserve_port(host: str, port: int, name: str = "HTTP_PORT") -> socket.socket:
    """Bind the port that the workers share, without listening. Raise StartupError when another process holds it.

    Keep the socket: it holds the port (any free one for 0) while workers come and go.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Without SO_REUSEPORT first, which fails if any process listens here, another predlog included.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
        shared = socket.socket(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((host, port))
        return shared
    except (OSError, UnicodeError) as error:  # UnicodeError: the idna codec refuses the name
        why = getattr(error, "strerror", None) or error
        raise StartupError(f"cannot listen on {host}:{port}: {why}; stop the other program, or set {name}") from None


def supervise(count: int, work: Callable[[int, int, bool], int], shutdown_seconds: float) -> int:
    """Fork `count` workers, each running `work(index, alive_fd, replaces)` to its exit code, until a signal stops all.

    Return the exit code. `alive_fd` becomes readable when the supervisor has ended, even by SIGKILL. A worker that dies
    is replaced. One that fails within EARLY_SECONDS of the start ends everything with its exit code. SIGHUP is passed
    on. After a stop, workers are killed once `shutdown_seconds` and KILL_GRACE_SECONDS are over, or at a second SIGINT.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    alive_read, alive_write = os.pipe()
    workers: dict[int, int] = {}  # from the pid of each live worker to its index

    def fork(index: int, replaces: bool) -> None:
        if pid := os.fork():
            workers[pid] = index
            return
        os.close(alive_write)
        if replaces:
            time.sleep(RESTART_SECONDS)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        code = 1
        try:
            code = work(index, alive_read, replaces)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            log.exception("worker %d failed", index)
        finally:
            os._exit(code)

    early_until = time.monotonic() + EARLY_SECONDS
    for index in range(count):
        fork(index, replaces=False)
    exit_code, kill_at = 0, math.inf  # finite once a stop has begun
    while workers:
        info = signal.sigtimedwait(_SIGNALS, max(0.0, min(kill_at - time.monotonic(), IDLE_SECONDS)))
        signum, now, stopping = info.si_signo if info else 0, time.monotonic(), kill_at < math.inf
        stops = signum in (signal.SIGTERM, signal.SIGINT)
        for pid, index, code in _reap(workers):
            if stopping:
                exit_code = exit_code or (1 if code < 0 and code != -signal.SIGTERM else max(code, 0))
            elif code > 0 and now < early_until:
                exit_code, stops = exit_code or code, True
            else:
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                log.error("worker %d (pid %d) ended %s; starting another", index, pid, how)
                fork(index, replaces=True)
        if signum == signal.SIGHUP:
            _tell(workers, signal.SIGHUP)
        if stops and not stopping:
            kill_at = now + shutdown_seconds + KILL_GRACE_SECONDS
            _tell(workers, signal.SIGTERM)
        elif workers and (now >= kill_at or (stopping and signum == signal.SIGINT)):
            log.error("%d worker(s) did not stop in time; killed", len(workers))
            _tell(workers, signal.SIGKILL)
            kill_at, exit_code = now + IDLE_SECONDS, exit_code or 1
    return exit_code


def _tell(workers: dict[int, int], signum: signal.Signals) -> None:
    for pid in workers:
        os.kill(pid, signum)


def _reap(workers: dict[int, int]) -> list[tuple[int, int, int]]:
    """Remove from `workers` all that have ended, before any is acted on: a reaped pid must not be signalled.

    Return each as (pid, index, exit code). The exit code is minus the signal's number if a signal ended it.
    """
    ended = []
    for pid in list(workers):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended.append((pid, workers.pop(pid), os.waitstatus_to_exitcode(status)))
    return ended
