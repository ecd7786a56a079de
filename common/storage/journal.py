"""What is remembered next to the CSV: which bytes of which file are committed, and the ids of recent messages.

An append-only text file. Each line is a checksum and one JSON record, and is one commit: one write, one fsync. A line
cut short by a crash is a commit that never was. The first line holds every id, the others the ids of their commit.
The file is replaced as a whole (written to a new file, synced, renamed) when it has grown, and when anything about it
failed, because after a failed write or fsync nobody knows what of it is on disk.

A second file, the mark, says how far the journal went. It is written after each commit and not synced. It tells a
journal whose end is gone (truncated, or an old copy put back) from one whose last commit never was.
Knows nothing of the CSV itself. For one thread.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, islice
from struct import iter_unpack

from common.storage.files import naming, sync_directory
from common.storage.state import FileState, LastRun

ID_BYTES = 16


class JournalCorrupt(Exception):
    """The journal is there, and does not say what was committed."""


class Journal:
    def __init__(self, path: str, dedup_window: int, prefetch_count: int, log: logging.Logger) -> None:
        self.path = path
        self._log = log
        self._dedup_window = dedup_window
        self._prefetch_count = prefetch_count
        self._order: deque[bytes] = deque()  # the same ids in commit order
        self._ids: set[bytes] = set()
        self._fd = -1  # -1: the next commit writes the file anew
        self._bytes = 0
        self._mark: tuple[int, int] | None = None  # inode and committed length, as the mark may say at most
        self._mark_fd = -1

    @property
    def window(self) -> int:
        """The number of ids that are remembered.

        The broker can redeliver `prefetch_count` messages, and while it does others are committed: twice covers both.
        The largest `prefetch_count` ever used counts, because what was unacked under it may still come back.
        """
        return max(self._dedup_window, 2 * self._prefetch_count)

    def load(self) -> LastRun | None:
        """Remember the ids of the last run, and return what else it left; None without a journal.

        Raise OSError, and JournalCorrupt for anything that a crash of ours cannot have left.
        """
        self._mark = _read_mark(self._mark_path)
        try:
            with open(self.path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return None
        texts = [_checked(line) for line in lines[:-1]]
        whole = [text for text in texts if text is not None]
        if not whole or None in texts[: len(whole)]:
            raise JournalCorrupt("a damaged line" if whole else "no whole line")
        try:
            ids = deque[str]()
            for text in whole:
                record = json.loads(text)
                ids.append(record["ids"])
            state = FileState(**record["file"])
            clean = bool(record["clean"])
            prefetch_count = int(record["prefetch_count"])
            packed = bytes.fromhex("".join(ids))
            if len(packed) % ID_BYTES or not 0 <= state.chunk_offset <= state.committed_bytes:
                raise ValueError("impossible numbers")
        except (ValueError, TypeError, KeyError) as error:
            raise JournalCorrupt(f"not a journal of this version ({error!r})") from error
        self._prefetch_count = max(self._prefetch_count, prefetch_count)
        self._remember([id for (id,) in iter_unpack("16s", packed[-self.window * ID_BYTES :])])
        outdated = ""
        if self._mark is not None and self._mark[0] == state.inode and self._mark[1] > state.committed_bytes:
            outdated = f"its end is gone: it knows of {state.committed_bytes} bytes, not {self._mark[1]}"
        return LastRun(state, clean, outdated)

    def seen(self, id: bytes) -> bool:
        return id in self._ids

    def __len__(self) -> int:
        return len(self._order)

    def ids(self) -> Iterator[bytes]:
        """In the order of their commits, the oldest first."""
        return iter(self._order)

    def commit(self, state: FileState, ids: Sequence[bytes] = (), clean: bool = False) -> None:
        """Make `state` and new `ids` (16 bytes each) durable, then remember them.

        Raise OSError; then the commit is on disk or not, and the same call again settles it.
        """
        if self._mark is not None and not (self._mark[0] == state.inode and self._mark[1] <= state.committed_bytes):
            self._write_mark(state, sync=True)  # it must never be ahead, not even after a power cut
        if self._fd >= 0 and self._bytes < self._limit_bytes() and self._untouched():
            self._append(self._line(state, ids, clean))
        else:
            known = islice(self._order, max(0, len(self._order) + len(ids) - self.window), None)
            self._replace(self._line(state, chain(known, ids), clean))
        self._remember(ids)
        with suppress(OSError):  # an older mark is as good as none
            self._write_mark(state, sync=False)

    def close(self) -> None:
        self._close_file()
        if self._mark_fd >= 0:
            os.close(self._mark_fd)
            self._mark_fd = -1

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def _mark_path(self) -> str:
        return f"{self.path}.mark"

    def _write_mark(self, state: FileState, sync: bool) -> None:
        mark = state.inode, state.committed_bytes
        if not sync:
            self._mark = mark  # it may be there although the write fails
        if self._mark_fd < 0:
            self._mark_fd = os.open(self._mark_path, os.O_RDWR | os.O_CREAT, 0o644)
        text = b'{"file": {"inode": %d, "committed_bytes": %d}}' % mark
        with naming(self._mark_path):
            os.pwrite(self._mark_fd, _with_checksum(text.ljust(100)), 0)
            if sync:
                os.fsync(self._mark_fd)
        self._mark = mark

    def _remember(self, ids: Sequence[bytes]) -> None:
        self._order.extend(ids)
        self._ids.update(ids)
        for _ in range(len(self._order) - self.window):
            self._ids.discard(self._order.popleft())

    def _line(self, state: FileState, ids: Sequence[bytes] | chain[bytes], clean: bool) -> bytes:
        record = {
            "file": asdict(state),
            "clean": clean,
            "prefetch_count": self._prefetch_count,
            "ids": b"".join(ids).hex(),
        }
        return _with_checksum(json.dumps(record).encode())

    def _limit_bytes(self) -> int:
        return (4 << 20) + 2 * (2 * ID_BYTES * self.window)

    def _untouched(self) -> bool:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            status = None
        ours = os.fstat(self._fd)
        if status and (status.st_ino, status.st_dev, status.st_size) == (ours.st_ino, ours.st_dev, self._bytes):
            return True
        self._log.warning("%s: another program changed or removed it; it is written anew, whole", self.path)
        return False

    def _append(self, line: bytes) -> None:
        try:
            with naming(self.path):
                _write(self._fd, line)
                os.fsync(self._fd)
        except OSError:
            self._close_file()
            raise
        self._bytes += len(line)

    def _replace(self, line: bytes) -> None:
        self._close_file()
        new = f"{self.path}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            with naming(self.path):
                _write(fd, line)
                os.fsync(fd)
                os.rename(new, self.path)
                sync_directory(self.path)
        except OSError:
            os.close(fd)
            with suppress(OSError):
                os.unlink(new)
            raise
        self._fd = fd
        self._bytes = len(line)


def _read_mark(path: str) -> tuple[int, int] | None:
    """Inode and committed length; None without a mark, and for a torn one."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as file:
        text = _checked(file.readline().removesuffix(b"\n"))
        if text is not None:
            record = json.loads(text)["file"]
            return int(record["inode"]), int(record["committed_bytes"])
    return None


def _with_checksum(text: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _checked(line: bytes) -> bytes | None:
    checksum, _, text = line.partition(b" ")
    return text if checksum == b"%08x" % zlib.crc32(text) else None


def _write(fd: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(fd, rest) :]
