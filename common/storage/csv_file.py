"""The CSV file on disk: append, sync, find where its rows end, set bytes aside.

recovery.py and store.py decide which bytes are committed, and what becomes of the others. All can raise OSError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

from common.event.rows import CSV_HEADER
from common.storage.files import BLOCK_BYTES, free_name, is_at, naming, open_regular, sync_directory, write_all

CHUNK_BYTES = 64 << 10  # of the committed end, whose checksum identifies the file


class CsvFile:
    """One open CSV file, with an flock of its own: removing the lock file must not let two consumers write."""

    def __init__(self, path: str, mode: int | None = None) -> None:
        """Open `path`; create a missing file, empty, with the permission bits `mode` (None: the usual ones)."""
        self.path = path
        self._fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise OSError(errno.EBUSY, "is in use by another consumer", path) from error
        status = os.fstat(self._fd)
        self.device = status.st_dev
        self.inode = status.st_ino

    def close(self) -> None:
        os.close(self._fd)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def size_and_mode(self) -> tuple[int, int]:
        """Return the size and the permission bits."""
        status = os.fstat(self._fd)
        return status.st_size, stat.S_IMODE(status.st_mode)

    def check_header(self) -> None:
        """Raise OSError for a file that is not predlog's: as far as it goes, it does not begin with our header."""
        if not CSV_HEADER.startswith(b"".join(self.read(0, len(CSV_HEADER)))):
            text = f"does not begin with the line {CSV_HEADER.decode().strip()!r} and CRLF: move it away"
            raise OSError(errno.EINVAL, text, self.path)

    def is_at(self, path: str) -> bool:
        """Return whether `path` leads to this file: nothing was renamed, removed or replaced."""
        return is_at(self._fd, path)

    def write(self, data: bytes) -> None:
        """Append `data`. After an error any part of it may be at the end of the file."""
        with naming(self.path):
            write_all(self._fd, data)

    def sync(self) -> None:
        with naming(self.path):
            os.fsync(self._fd)

    def cut(self, length: int) -> None:
        with naming(self.path):
            os.ftruncate(self._fd, length)

    def read(self, start: int, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `end`, or up to the end of the file, in blocks."""
        return read(self._fd, start, end)

    def rows_end(self, start: int = 0) -> int:
        """Find the offset after the last whole row; `start` is the end of an earlier row, or 0."""
        with open(self._fd, "rb", BLOCK_BYTES, closefd=False) as file:
            file.seek(start)
            return start + rows_end(file)

    def set_aside(self, start: int, csv_path: str = "") -> str:
        """Move the bytes from `start` on to a new file, synced before the cut; return its path.

        It is beside the file, and named after it, or after `csv_path`.
        """
        aside = free_name(f"{csv_path or self.path}.uncommitted-")
        part = f"{aside}.part"
        fd = open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self.size_and_mode()[1])
        try:
            with naming(part), open(fd, "wb") as file:
                for block in self.read(start):
                    file.write(block)
                file.flush()
                os.fsync(fd)
            os.rename(part, aside)
            sync_directory(aside)
        except OSError:
            with suppress(OSError):  # the disk may be full
                os.unlink(part)
            raise
        self.cut(start)
        return aside


def read(fd: int, start: int, end: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` up to `end`, or up to its end, in blocks."""
    while end is None or start < end:
        block = os.pread(fd, BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - start), start)
        if not block:
            return
        yield block
        start += len(block)


def crc32(blocks: Iterable[bytes]) -> int:
    checksum = 0
    for block in blocks:
        checksum = zlib.crc32(block, checksum)
    return checksum


def rows_end(lines: Iterable[bytes]) -> int:
    """Find the offset after the last whole row: after the last CRLF with an even number of quotes before it."""
    end = offset = quotes = 0
    for line in lines:
        offset += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\r\n"):
            end = offset
    return end
