"""The mark, `<csv>.committed`, which the journal writes, and the reader of the rows up to there.

The mark is the committed length as one line of JSON, rewritten in place after each commit and not synced. It may be
older than the journal, and is never ahead of it. Readers need no lock and no consumer. For the journal the mark
distinguishes an end that is gone (truncated, or an old copy put back) from a last commit that never happened.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from typing import NamedTuple

from common.errors import StartupError
from common.storage.csv_file import read
from common.storage.files import explain_os_error, naming, open_regular

_LINE_BYTES = 160
_PATIENCE_SECONDS = 2.0  # a rotation is over by then, even on a slow disk
_POLL_SECONDS = 0.02


class Mark(NamedTuple):
    inode: int
    committed_bytes: int
    generation: int


NOTHING = Mark(0, 0, 0)


class MarkFile:
    """The mark on disk. `last` is the furthest that it can say."""

    def __init__(self, csv_path: str) -> None:
        self.last = NOTHING
        self._csv_path = csv_path
        self._path = f"{csv_path}.committed"

    def load(self) -> Mark:
        """Return what the last run wrote. Raise OSError."""
        self.last = read_mark(self._csv_path)
        return self.last

    def write(self, mark: Mark) -> None:
        """Write the mark. Raise OSError."""
        self.last = mark  # a failed write may have reached the disk
        text = b'{"inode": %d, "committed_bytes": %d, "generation": %d' % mark
        line = b'%b, "crc32": %d}' % (text, zlib.crc32(text))
        with self._open() as file, naming(self._path):
            file.write(line.ljust(_LINE_BYTES - 1) + b"\n")

    def clear(self) -> None:
        """Empty the mark, durably. Raise OSError."""
        with self._open() as file, naming(self._path):
            os.ftruncate(file.fileno(), 0)
            os.fsync(file.fileno())
        self.last = NOTHING

    def _open(self) -> FileIO:
        """Open the file that is at the path now, or make one, since anyone can remove it."""
        return FileIO(open_regular(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+")


def read_mark(csv_path: str) -> Mark:
    """Return the mark of a CSV; NOTHING if it is missing or torn. Raise OSError."""
    path = f"{csv_path}.committed"
    with (
        suppress(FileNotFoundError, ValueError, KeyError, TypeError),
        open(open_regular(path, os.O_RDONLY), "rb") as file,
        naming(path),
    ):
        line = file.readline()
        record = json.loads(line)
        if record["crc32"] == zlib.crc32(line.rpartition(b', "crc32"')[0]):
            return Mark(record["inode"], record["committed_bytes"], record["generation"])
    return NOTHING


def committed_rows(csv_path: str) -> Iterator[bytes]:
    """Yield the header and the committed rows of a CSV in blocks; a block can end within a row.

    All blocks together are whole rows, which are never taken back. Raise StartupError when there is no CSV, and when
    nothing says how much of it is committed.
    """
    path = os.path.realpath(csv_path)
    try:
        fd, left = _open(path)
        with open(fd, "rb"):
            for block in read(fd, 0, left):
                yield block
                left -= len(block)
    except OSError as error:
        raise StartupError(explain_os_error(error, path)) from error
    if left:
        raise StartupError(f"{path}: another program truncated it while it was read")


def _open(path: str) -> tuple[int, int]:
    """Open a CSV; return its descriptor and its committed length. Wait for a rotation to end. Raise OSError."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        mark = read_mark(path)
        with suppress(FileNotFoundError):
            fd = open_regular(path, os.O_RDONLY)
            # Another program may have truncated it.
            if os.fstat(fd).st_ino == mark.inode and os.pread(fd, 2, mark.committed_bytes - 2) == b"\r\n":
                return fd, mark.committed_bytes
            os.close(fd)
        time.sleep(_POLL_SECONDS)
    os.stat(path)  # raises when there is no CSV
    raise StartupError(f"{path}: nothing says how much of it is committed; start the consumer, or read the file itself")
