"""The lock that makes one consumer the owner of a CSV."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress

from common.errors import StartupError
from common.storage.files import explain_os_error, make_directory, startup_error

WATCH_SECONDS = 1.0  # a consumer under load commits many times within it
_PF_EXITING = 0x4  # include/linux/sched.h


class Lock:
    """An flock on `<csv>.lock`, which ends with the process, however it ends.

    On some network file systems flock has no effect. So the file also names its owner until it is released. An owner
    that still runs is not taken for dead only because the lock could be acquired.
    """

    def __init__(self, csv_path: str) -> None:
        path = os.path.realpath(csv_path)
        self.path = f"{path}.lock"
        self._journal_path = f"{path}.journal"
        self._fd = -1
        self._owned = False
        self._works = False  # it was refused once, so flock has an effect between this process and the owner
        self._watched: tuple[float, object] | None = None  # since when, and the journal as it was then

    def acquire(self) -> bool:
        """Take the lock, or return False at once when another process has it. Make the folder.

        Return False also while an owner that did not release it is watched; call again. Raise as Store.open does, and
        StartupError when that owner still writes.
        """
        if self._fd < 0 and not self._take():
            return False
        try:
            if not (self._works or self._last_owner_is_gone()):
                return False
        except StartupError:
            self._close()
            raise
        self._sign()
        return True

    def renew(self) -> None:
        """Make a removed lock file again, so that it keeps others out. Raise OSError if another process has it."""
        if not self._owned or self._is_in_place():
            return
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise OSError(errno.EBUSY, "is in use by another consumer", self.path) from error
        self._close()
        self._fd = fd
        self._sign()

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two processes could each hold a lock of that name."""
        if self._owned:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
        self._close()

    def _take(self) -> bool:
        try:
            make_directory(os.path.dirname(self.path))
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise startup_error(error, self.path) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            self._works = True
            return False
        except OSError as error:
            os.close(fd)
            raise StartupError(explain_os_error(error, self.path)) from error
        self._fd = fd
        return True

    def _close(self) -> None:
        self._owned, self._watched = False, None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _sign(self) -> None:
        self._owned = True
        with suppress(OSError):  # without space for a signature, flock alone decides
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()} {_here()} {_started(os.getpid())}\n".encode(), 0)

    def _last_owner_is_gone(self) -> bool:
        """Return False while that is not known. Raise StartupError when the last owner is still alive."""
        signature = os.pread(self._fd, 1000, 0).decode("ascii", "replace").split()
        if len(signature) != 4:  # released; or signed by predlog 1.0.0
            return True
        pid, *here, started = signature
        if " ".join(here) == _here():
            if pid == str(os.getpid()) or _started(pid) != started:
                return True
            raise StartupError(
                f"{self.path}: process {pid} owns it and still runs, although the lock could be acquired: flock has no "
                "effect on this file system; stop that process, or set CSV_FILE to another place"
            )
        # A process on another machine, in another container, or before a reboot. Only writes show whether it is alive.
        journal = self._journal_signature()
        if self._watched is None:
            self._watched = time.monotonic(), journal
        since, before = self._watched
        if journal != before:
            raise StartupError(
                f"{self.path}: another consumer (process {pid} on another machine or in another container) writes to "
                "the CSV, although the lock could be acquired: flock has no effect here; stop it, or set CSV_FILE"
            )
        return time.monotonic() - since >= WATCH_SECONDS

    def _journal_signature(self) -> object:
        try:
            status = os.stat(self._journal_path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def _here() -> str:
    """Return an id of this boot and this PID namespace, within which a pid means one process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "- -"


def _started(pid: int | str) -> str:
    """Return when a process was started, in ticks since boot; "-" if there is no such process.

    One that is exiting does not count: its files are closed, though it may stay a zombie.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # proc(5), from its third field on
    except OSError:
        return "-"
    return "-" if int(fields[6]) & _PF_EXITING else fields[19]
