"""The committed rows of a CSV for readers: without a lock, beside a running consumer or without one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from common.errors import StartupError
from common.storage.committed import read_mark
from common.storage.csv_file import crc32, read
from common.storage.files import explain_os_error, open_regular
from common.storage.journal import read_journal
from common.storage.records import JournalCorrupt, Reading

_PATIENCE_SECONDS = 2.0  # a rotation is over by then, even on a slow disk
_POLL_SECONDS = 0.02


def committed_rows(csv_path: str) -> Iterator[bytes]:
    """Yield the header and the committed rows of a CSV in blocks; a block can end within a row.

    All blocks together are whole rows, which are never taken back. Raise StartupError when there is no CSV, and when
    nothing says how much of it is committed.
    """
    path = os.path.realpath(csv_path)
    try:
        fd, end = _open(path)
        try:
            start = 0
            for block in read(fd, 0, end):
                yield block
                start += len(block)
        finally:
            os.close(fd)
    except OSError as error:
        raise StartupError(explain_os_error(error, path)) from error
    if start < end:
        raise StartupError(f"{path}: another program truncated it while it was read")


def _open(path: str) -> tuple[int, int]:
    """Open a CSV; return its descriptor and its committed length. Wait for a rotation to end."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        last_try = time.monotonic() > deadline
        try:
            fd = open_regular(path, os.O_RDONLY)
        except FileNotFoundError:
            if last_try or not os.path.exists(f"{path}.journal"):
                raise
        else:
            if (end := _committed_bytes(path, fd, last_try)) is not None:
                return fd, end
            os.close(fd)
            if last_try:
                raise StartupError(
                    f"{path}: neither {path}.committed nor {path}.journal says how much of it is committed: "
                    "start the consumer, or read the file itself"
                )
        time.sleep(_POLL_SECONDS)


def _committed_bytes(path: str, fd: int, last_try: bool) -> int | None:
    """Return the committed length by the mark, or by the journal when no mark comes; None if neither knows the file."""
    status, mark = os.fstat(fd), read_mark(path)
    if mark is not None and mark.inode == status.st_ino and os.pread(fd, 2, mark.committed_bytes - 2) == b"\r\n":
        return mark.committed_bytes
    if mark is not None and not last_try:
        return None
    reading = Reading(f"{path}.journal", 0, 0)
    try:
        read_journal(reading)
        state = reading.last_commit()
    except (FileNotFoundError, JournalCorrupt):
        return None
    intact = crc32(read(fd, state.chunk_offset, state.committed_bytes)) == state.chunk_crc32
    return state.committed_bytes if intact and status.st_size >= state.committed_bytes else None
