"""The lock that makes one consumer the owner of a CSV."""

from __future__ import annotations

import fcntl
import os

from common.storage.files import make_directory, mode_of, open_regular, startup_error


class Lock:
    """An flock on `<csv>.lock`, which ends with the process, however it ends.

    On some network file systems flock has no effect. There the journal keeps a second writer out.
    """

    def __init__(self, csv_path: str) -> None:
        self._csv_path = os.path.realpath(csv_path)
        self.path = f"{self._csv_path}.lock"
        self._fd = -1

    def acquire(self) -> bool:
        """Make the folder and take the lock; return False if another process has it. Raise what Store.open raises."""
        try:
            make_directory(os.path.dirname(self.path))
            self._fd = open_regular(self.path, os.O_RDWR | os.O_CREAT, mode_of(self._csv_path))
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except OSError as error:
            self.release()
            raise startup_error(error, self.path) from error
        return True

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two processes could each hold a lock of that name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
