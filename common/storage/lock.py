"""The lock that makes one consumer the owner of a CSV."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from common.errors import StartupError
from common.storage.files import explain_os_error, make_directory, startup_error


class Lock:
    """An flock on `<csv>.lock`, which ends with the process, however it ends."""

    def __init__(self, csv_path: str) -> None:
        self.path = os.path.realpath(csv_path) + ".lock"
        self._fd = -1

    def acquire(self) -> bool:
        """Take the lock, or return False at once when another has it. Make the folder. Raise as Store.open does."""
        try:
            make_directory(os.path.dirname(self.path))
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise startup_error(error, self.path) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as error:
            os.close(fd)
            raise StartupError(explain_os_error(error, self.path)) from error
        self._fd = fd
        with suppress(OSError):  # the pid is only for people
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return True

    def release(self) -> None:
        """Give the lock up. The file stays: were it removed, two processes could each hold a lock of that name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
