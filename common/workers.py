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
from collections import deque
from collections.abc import Callable, MutableSequence
from typing import cast

from common.errors import StartupError

log = logging.getLogger("predlog.workers")

RESTART_SECONDS = 0.5
EARLY_SECONDS = 10.0  # a worker that fails this soon after the start has a cause that a restart does not fix
KILL_GRACE_SECONDS = 2.0
READY_SECONDS = 30.0  # for a replacement to listen
ROLLOUT_POLL_SECONDS = 0.05
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def shared_rows(rows: int, floats: int, fd: int = -1) -> list[MutableSequence[float]]:
    """Return rows of floats that this process shares with its forks, and with others by the `fd` of a `rows_file`."""
    view = memoryview(mmap.mmap(fd, rows * floats * 8)).cast("d")
    return [cast(MutableSequence[float], view[row * floats : (row + 1) * floats]) for row in range(rows)]


def rows_file(rows: int, floats: int) -> int:
    """Return the descriptor of a file in memory for `shared_rows`, which a replacement worker can inherit."""
    fd = os.memfd_create("predlog-metrics")
    os.ftruncate(fd, rows * floats * 8)
    return fd


def reserve_port(host: str, port: int) -> socket.socket:
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
        raise StartupError(f"cannot listen on {host}:{port}: {why}; stop the other program, or set HTTP_PORT") from None


class _Rollout:
    """The replacement of all workers, one by one. Each old worker stops once its replacement listens.

    `start(index)` starts a new worker and returns its pid and a pipe that it writes to when it listens. `workers` maps
    the pid of each live worker to its index.
    """

    def __init__(self, workers: dict[int, int], start: Callable[[int], tuple[int, int]]) -> None:
        self.leaving: set[int] = set()
        self.index = -1  # of the worker that is being replaced
        self.new_pid = 0  # 0 once it listens
        self._workers = workers
        self._start = start
        self._pending = deque(sorted(set(workers.values())))
        self._old: set[int] = set()
        self._ready_fd = -1
        self._gives_up_at = 0.0

    def step(self, now: float) -> bool:
        """Continue as far as possible without waiting. Return False when all are replaced, or one cannot be."""
        if self.leaving & self._workers.keys():
            return True
        if not self.new_pid:
            if not self._pending:
                return False
            self.index = self._pending.popleft()
            self.leaving = set()
            self._old = {pid for pid, index in self._workers.items() if index == self.index}
            self.new_pid, self._ready_fd = self._start(self.index)
            self._gives_up_at = now + READY_SECONDS
            return True
        try:
            ready = os.read(self._ready_fd, 1)
        except BlockingIOError:
            if now < self._gives_up_at:
                return True
            ready = b""
        os.close(self._ready_fd)
        if not ready:
            log.error("the new worker %d does not listen; the old workers stay", self.index)
            if self.new_pid in self._workers:
                os.kill(self.new_pid, signal.SIGKILL)
            return False
        self.new_pid, self.leaving = 0, self._old & self._workers.keys()
        for pid in self.leaving:
            os.kill(pid, signal.SIGTERM)
        return True


def supervise(
    count: int,
    work: Callable[[int, int, bool], int],
    shutdown_seconds: float,
    replacement: Callable[[int, int, int], None] | None = None,
) -> int:
    """Fork `count` workers, each running `work(index, alive_fd, replaces)` to its exit code, until a signal stops all.

    Return the exit code. `alive_fd` becomes readable when the supervisor has ended, even by SIGKILL. A worker that dies
    is replaced. One that fails within EARLY_SECONDS of the start ends everything with its exit code. SIGHUP is passed
    on. With a `replacement(index, alive_fd, ready_fd)`, which executes the program again in a forked process, SIGHUP
    replaces the workers one by one.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    alive_read, alive_write = os.pipe()
    began = time.monotonic()
    workers: dict[int, int] = {}

    def fork(index: int, replaces: bool, ready_fd: int = -1) -> int:
        pid = os.fork()
        if pid:
            workers[pid] = index
            return pid
        os.close(alive_write)
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        code = 1
        try:
            if replacement is not None and ready_fd >= 0:
                replacement(index, alive_read, ready_fd)
            code = work(index, alive_read, replaces)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            log.exception("worker %d failed", index)
        finally:
            os._exit(code)

    def start_anew(index: int) -> tuple[int, int]:
        ready_read, ready_write = os.pipe()
        os.set_blocking(ready_read, False)
        pid = fork(index, True, ready_write)
        os.close(ready_write)
        return pid, ready_read

    for index in range(count):
        fork(index, replaces=False)
    rollout: _Rollout | None = None
    failed: set[int] = set()  # replacements that do not listen
    exit_code, kill_at = 0, None
    due: list[tuple[float, int]] = []  # restarts, each as (time, index)
    while workers or (due and kill_at is None):
        wake = [when for when, _ in due] if kill_at is None else [kill_at]
        if rollout is not None:
            wake.append(time.monotonic() + ROLLOUT_POLL_SECONDS)
        info = signal.sigtimedwait(_SIGNALS, max(0.0, min(wake, default=time.monotonic() + 60) - time.monotonic()))
        now = time.monotonic()
        if info is not None and info.si_signo == signal.SIGHUP:
            if replacement is None:
                _tell(workers, signal.SIGHUP)
            elif kill_at is None and rollout is None:
                log.info("replacing %d worker(s), one by one", count)
                rollout = _Rollout(workers, start_anew)
        elif info is not None and info.si_signo in (signal.SIGTERM, signal.SIGINT) and kill_at is None:
            kill_at = now + shutdown_seconds + KILL_GRACE_SECONDS
            _tell(workers, signal.SIGTERM)
        for pid, index, code in _reap(workers):
            if kill_at is not None:
                exit_code = exit_code or code
            elif pid in failed or (rollout is not None and pid in (*rollout.leaving, rollout.new_pid)):
                log.info("worker %d (pid %d) ended", index, pid)
            elif code > 0 and now - began < EARLY_SECONDS:
                exit_code, kill_at = code, now + shutdown_seconds + KILL_GRACE_SECONDS
                _tell(workers, signal.SIGTERM)
            else:
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                log.error("worker %d (pid %d) ended %s; starting another", index, pid, how)
                due.append((now + RESTART_SECONDS, index))
        if rollout is not None and (kill_at is not None or not rollout.step(now)):
            failed.add(rollout.new_pid)
            if kill_at is None and not any(i == rollout.index for p, i in workers.items() if p not in failed):
                due.append((now, rollout.index))
            rollout = None
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
    """Remove from `workers` all that have ended, before any is acted on: a reaped pid must not be signalled.

    Return each as (pid, index, exit code). The exit code is minus the signal's number if a signal ended it.
    """
    ended = []
    for pid in list(workers):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended.append((pid, workers.pop(pid), os.waitstatus_to_exitcode(status)))
    return ended
