"""The committed length beside the CSV, `<csv>.committed`: how far its rows count.

One line of JSON, rewritten in place after each commit and not synced. It may be older than the journal, and is never
ahead of it. Readers stop there (reader.py). For the journal it is a mark, which distinguishes a journal whose end is
gone (truncated, or an old copy put back) from one whose last commit never happened.
"""

from __future__ import annotations

import json
import os
import zlib
from contextlib import suppress
from typing import NamedTuple

from common.storage.files import checked, naming, open_regular

_LINE_BYTES = 160


class Mark(NamedTuple):
    inode: int
    committed_bytes: int
    generation: int


class MarkFile:
    """The mark on disk. `last` is the furthest that it may say."""

    def __init__(self, csv_path: str) -> None:
        self.last: Mark | None = None
        self._csv_path = csv_path
        self._path = f"{csv_path}.committed"
        self._fd = -1

    def load(self) -> Mark | None:
        """Return the mark; None if it is missing or torn. Raise OSError."""
        self.last = read_mark(self._csv_path)
        return self.last

    def write(self, mark: Mark, mode: int | None, sync: bool = False) -> None:
        """Write the mark into the file, which has `mode` when it is opened. Raise OSError."""
        if not sync:
            self.last = mark  # a failed write may have reached the disk
        if self._fd < 0:
            self._fd = open_regular(self._path, os.O_RDWR | os.O_CREAT, mode)
            self.set_mode(mode)
        text = b'{"inode": %d, "committed_bytes": %d, "generation": %d' % mark
        with naming(self._path):
            os.pwrite(self._fd, (b'%b, "crc32": %d}' % (text, zlib.crc32(text))).ljust(_LINE_BYTES - 1) + b"\n", 0)
            if sync:
                os.fsync(self._fd)
        self.last = mark

    def set_mode(self, mode: int | None) -> None:
        if self._fd >= 0 and mode is not None:
            with suppress(PermissionError):
                os.fchmod(self._fd, mode)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_mark(csv_path: str) -> Mark | None:
    """Return the mark of a CSV, also that of predlog 1.0; None if it is missing or torn. Raise OSError."""
    line = _first_line(f"{csv_path}.committed")
    with suppress(ValueError, KeyError, TypeError):
        if line is not None:
            record = json.loads(line)
            if int(record["crc32"]) == zlib.crc32(line.rpartition(b', "crc32"')[0]):
                return Mark(int(record["inode"]), int(record["committed_bytes"]), int(record["generation"]))
        else:
            record = json.loads(checked(_first_line(f"{csv_path}.journal.mark") or b"") or b"{}")
            file = record["file"]
            return Mark(int(file["inode"]), int(file["committed_bytes"]), int(record.get("generation", 0)))
    return None


def _first_line(path: str) -> bytes | None:
    with suppress(FileNotFoundError), open(open_regular(path, os.O_RDONLY), "rb") as file, naming(path):
        return file.readline().removesuffix(b"\n")
    return None
