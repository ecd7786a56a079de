"""The journal next to the CSV: which bytes of which file are committed, and the ids of recent messages.

An append-only text file. Each line is one commit (records.py): one write, one fsync. A line cut short by a crash is a
commit that never happened. The file is replaced as a whole (new file, sync, rename) when it has grown, and after any
failure, because a failed write or fsync leaves it unknown what is on disk. A mark says how far it went (reader.py).

Locks decide who may write. Where they have no effect (some network file systems), the journal itself keeps a second
writer out. Each run has a generation, greater than any before. It begins with a fence, a line after which commits of
earlier generations do not count, written before the last state is read. Each commit ends with a check of the file. If
it is not as this run left it, a later generation may have begun, and nothing of this commit is acked. So the next run
sees a commit before the fence, and this run notices one after it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

from common.errors import TakenOver
from common.storage import records
from common.storage.files import BLOCK_BYTES, free_name, naming, open_regular, sync_directory, write_all
from common.storage.reader import Mark, MarkFile
from common.storage.records import ID_BYTES, JournalCorrupt, Reading, split_ids
from common.storage.recovery import Corrupt, FileState, LastRun

_LINE_IDS = 1 << 16  # of a line that only carries ids, so that no line needs much memory
_LEAST_ROOM_BYTES = 4 << 20
_NOWHERE = 0, 0, 0


class Journal:
    """The journal of `csv_path`, for one thread. Its file has the permission bits `mode` (None: the usual ones)."""

    def __init__(self, csv_path: str, dedup_window: int, prefetch_count: int) -> None:
        self.path = f"{csv_path}.journal"
        self.mode: int | None = None
        self.window_seconds: float | None = None  # how long the last full window of ids took to come
        self.window = records.window(dedup_window, prefetch_count)  # the number of ids that are kept
        self._dedup_window = dedup_window
        self._prefetch_count = prefetch_count
        self._ids: set[bytes] = set()
        self._order = bytearray()  # the same ids in the order of their commits
        self._window_ids = 0  # of the window that is being filled
        self._window_began = time.monotonic()
        self._generation = time.time_ns()  # of this run: unique, and `load` makes it greater than any before
        self._place = _NOWHERE  # device, inode and size of the journal as this run left it
        self._fd = -1  # -1: the next commit writes a new file
        self._mark = MarkFile(csv_path)

    def expect_again(self, events: int) -> None:
        """Raise the number of events that can be delivered again. The next commit makes it durable."""
        self._prefetch_count = max(self._prefetch_count, events)
        self.window = records.window(self._dedup_window, self._prefetch_count)

    def load(self) -> LastRun | Corrupt | None:
        """Begin a run: remember the ids of the last one, and return what else it left; None without a journal.

        Corrupt is anything that a crash of ours cannot have left. Raise OSError, and StartupError for a journal of a
        newer version. Neither takes anything away from the file.
        """
        mark = self._mark.load()
        self._generation = max(self._generation, mark.generation + 1)
        reading = Reading(self.path, self._dedup_window, self._prefetch_count)
        try:
            with open(open_regular(self.path, os.O_RDWR | os.O_APPEND), "rb", BLOCK_BYTES) as file, naming(self.path):
                read_lines(file, reading)
                reading.last_commit()  # raises for a file that is no journal, before anything is written
                self._generation = max(self._generation, reading.generation + 1)
                self._fence(file, reading)
                state = reading.last_commit()
        except FileNotFoundError:
            return None
        except JournalCorrupt as error:
            return Corrupt(str(error))
        self.expect_again(reading.prefetch_count)
        self._order, self._ids = reading.ids, set(split_ids(reading.ids))
        longer = mark.inode == state.inode and mark.committed_bytes > state.committed_bytes
        outdated = longer or mark.generation > reading.generation > 0  # a journal of 1.0 has none
        return LastRun(state, reading.clean, "its end is gone: its mark knows of a later commit" if outdated else "")

    def seen(self, id: bytes) -> bool:
        return id in self._ids

    def __len__(self) -> int:
        return len(self._order) // ID_BYTES

    def commit(self, state: FileState, ids: Sequence[bytes] = (), clean: bool = False) -> None:
        """Make `state` and new `ids` (16 bytes each) durable, then remember them.

        Raise OSError if the commit may or may not be on disk; repeat the same call until it succeeds. Raise TakenOver
        when another run has begun; this one must then touch nothing and ack nothing.
        """
        last = self._mark.last
        if last.inode != state.inode or last.committed_bytes > state.committed_bytes:
            self._mark.clear()  # it must never be ahead of the journal, not even after a power cut
        packed = b"".join(ids)
        line = records.commit_line(state, packed, clean, self._prefetch_count)
        if not (self._has_room() and self._append(line)):
            self._replace(line, len(packed))
        self._remember(ids, packed)
        with suppress(OSError):  # an older mark does no harm
            self._mark.write(Mark(state.inode, state.committed_bytes, self._generation))

    def set_mode(self, mode: int) -> None:
        """Give the file that is there, and all later ones, these permission bits. Raise OSError."""
        if mode != self.mode and self._fd >= 0:
            with naming(self.path):
                os.fchmod(self._fd, mode)
        self.mode = mode

    def set_aside(self) -> str:
        """Rename the journal on disk, which is corrupt or outdated; return its new name."""
        aside = free_name(f"{self.path}.corrupt-")
        os.rename(self.path, aside)
        sync_directory(aside)
        self._place = _NOWHERE
        return aside

    def check(self) -> None:
        """Raise TakenOver if another run has begun, OSError if that cannot be determined."""
        if self._is_untouched():
            return
        reading = Reading(self.path, 0, 0)
        with suppress(FileNotFoundError, JournalCorrupt):  # a damaged one, too, as far as it can be read
            read_journal(reading)
        if reading.generation > self._generation:
            raise TakenOver(
                f"{self.path}: another consumer has begun to write the same CSV, although this one has its lock (the "
                "lock file was removed, or flock has no effect on this file system); this one stops and acks nothing"
            )

    def close(self) -> None:
        """Close the files. A later commit writes a new journal."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _remember(self, ids: Sequence[bytes], packed: bytes) -> None:
        self._ids.update(ids)
        self._order += packed
        if (over := len(self._order) - ID_BYTES * self.window) > 0:
            self._ids.difference_update(split_ids(self._order[:over]))
            del self._order[:over]
        self._window_ids += len(ids)
        if self._window_ids >= self.window:
            now = time.monotonic()
            self.window_seconds = now - self._window_began
            self._window_ids, self._window_began = 0, now

    def _has_room(self) -> bool:
        """Return whether the journal is open and has not grown too much."""
        limit_bytes = _LEAST_ROOM_BYTES + 2 * (2 * ID_BYTES * self.window)
        return self._fd >= 0 and self._place[2] < limit_bytes

    def _fence(self, file: BinaryIO, reading: Reading) -> None:
        """Write the fence of this run, and take what was committed before it."""
        fence, fd = records.fence_line(self._generation), file.fileno()
        position = os.lseek(fd, 0, os.SEEK_CUR)
        write_all(fd, b"\n" + fence)  # a torn commit may come before it
        os.fsync(fd)
        os.lseek(fd, position, os.SEEK_SET)  # appending has moved it
        came, status = read_lines(file, reading, fence), os.fstat(fd)
        self._place = status.st_dev, status.st_ino, file.tell()
        if not (came and self._is_untouched()):  # another run is still at work, perhaps in another file
            raise OSError(errno.EBUSY, "was changed while it was read")

    def _is_untouched(self) -> bool:
        """Return whether the journal is as this run left it."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return self._place == _NOWHERE
        return (status.st_dev, status.st_ino, status.st_size) == self._place

    def _append(self, line: bytes) -> bool:
        """Append a commit; return whether the journal is as this run left it. Raise OSError and TakenOver."""
        device, inode, size = self._place
        try:
            with naming(self.path):
                write_all(self._fd, line)
                os.fsync(self._fd)
            self._place = device, inode, size + len(line)
            if self._is_untouched():
                return True
            self.check()
        except OSError:
            self.close()
            raise
        return False

    def _replace(self, commit: bytes, new_bytes: int) -> None:
        """Write a new journal: the ids that stay in the window beside `new_bytes` of new ones, then the commit."""
        self.close()
        new = f"{self.path}.new"
        fd = open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, self.mode)
        try:
            with naming(self.path):
                write_all(fd, records.first_line(self._generation))
                first = max(0, len(self._order) + new_bytes - ID_BYTES * self.window)
                for at in range(first, len(self._order), ID_BYTES * _LINE_IDS):
                    write_all(fd, records.ids_line(self._order[at : at + ID_BYTES * _LINE_IDS]))
                write_all(fd, commit)
                os.fsync(fd)
                self.check()
                os.rename(new, self.path)
                sync_directory(self.path)
        except (OSError, TakenOver):
            os.close(fd)
            with suppress(OSError):
                os.unlink(new)
            raise
        status = os.fstat(fd)
        self._fd, self._place = fd, (status.st_dev, status.st_ino, status.st_size)


def read_journal(reading: Reading) -> None:
    """Take what a journal says now, without a fence. Raise OSError, and what Reading.take raises."""
    with naming(reading.path), open(open_regular(reading.path, os.O_RDONLY), "rb", BLOCK_BYTES) as file:
        read_lines(file, reading)


def read_lines(file: BinaryIO, reading: Reading, last: bytes = b"") -> bool:
    """Take the whole lines of a journal up to the line `last`, or up to its end; return whether `last` came.

    A line without an end is left unread, since it is torn or being written.
    """
    while (line := file.readline()).endswith(b"\n"):
        if line == last:
            return True
        reading.take(line[:-1])
    file.seek(-len(line), os.SEEK_CUR)
    return False
