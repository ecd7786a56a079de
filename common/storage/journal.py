"""The journal next to the CSV: which bytes of which file are committed, and the ids of recent messages.

An append-only text file. Each line is one commit (records.py): one write, one fsync. A line cut short by a crash is a
commit that never happened. The file is replaced as a whole (new file, sync, rename) when it has grown, and after any
failure, because a failed write or fsync leaves it unknown what is on disk. A mark says how far it went (committed.py).

Locks decide who may write. Where they have no effect (some network file systems), the journal itself keeps a second
writer out. Each run has a generation, greater than any before. It begins with a fence, a line after which commits of
earlier generations do not count, written before the last state is read. Each commit ends with a check of the file. If
it is not as this run left it, a later generation may have begun, and nothing of this commit is acked. So the next run
sees a commit before the fence, and this run notices one after it.

Knows nothing of the CSV itself. For one thread.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO

from common.errors import TakenOver
from common.storage.committed import Mark, MarkFile
from common.storage.files import BLOCK_BYTES, free_name, naming, open_regular, sync_directory, write_all
from common.storage.records import (
    ID_BYTES,
    JournalCorrupt,
    Reading,
    commit_line,
    fence_line,
    ids_line,
    split_ids,
    window,
)
from common.storage.state import FileState, LastRun

_LINE_IDS = 1 << 16  # of a line that only carries ids, so that no line needs much memory
_LEAST_ROOM_BYTES = 4 << 20
_EIGHTHS = 8


class Journal:
    """The journal of `csv_path`. Its files have the permission bits `mode`; None is what is usual."""

    def __init__(self, csv_path: str, dedup_window: int, prefetch_count: int, log: logging.Logger) -> None:
        self.path = f"{csv_path}.journal"
        self.mode: int | None = None
        self.window_seconds: float | None = None  # how long the last window of ids took to come, once one has
        self._log = log
        self._dedup_window = dedup_window
        self._prefetch_count = prefetch_count
        self._ids: set[bytes] = set()
        self._order = bytearray()  # the same ids in the order of their commits
        self._uncounted = 0  # ids since the last eighth of a window
        self._eighths: deque[float] = deque(maxlen=_EIGHTHS + 1)  # when the last ones were complete
        self._generation = time.time_ns()  # of this run: unique, and `load` makes it greater than any before
        self._last_generation = 0  # of the journal on the disk
        self._place: tuple[int, int, int] | None = None  # device, inode and size of the journal as this run left it
        self._fd = -1  # -1: the next commit writes a new file
        self._failed = False  # whether the last write did, so that what it left is unknown
        self._mark = MarkFile(csv_path)

    @property
    def window(self) -> int:
        """The number of ids that are kept."""
        return window(self._dedup_window, self._prefetch_count)

    def expect_again(self, events: int) -> None:
        """Raise the number of events that can be delivered again. The next commit makes it durable."""
        self._prefetch_count = max(self._prefetch_count, events)

    def load(self) -> LastRun | None:
        """Begin a run: remember the ids of the last one, and return what else it left; None without a journal.

        Raise OSError, JournalCorrupt for anything that a crash of ours cannot have left, and StartupError for a journal
        of a newer version. These two leave the file as it is.
        """
        mark = self._mark.load()
        newest = 0 if mark is None else mark.generation
        self._generation = max(self._generation, newest + 1)
        try:
            fd = open_regular(self.path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return None
        reading = Reading(self.path, self._dedup_window, self._prefetch_count)
        with open(fd, "rb", BLOCK_BYTES) as file, naming(self.path):
            read_lines(file, reading)
            reading.last_commit()  # raises for a file that is no journal, before anything is written
            self._generation = max(self._generation, reading.generation + 1)
            self._fence(file, reading)
            state = reading.last_commit()
        self._last_generation = reading.generation
        self._prefetch_count = reading.prefetch_count
        self._order, self._ids = reading.ids, set(split_ids(reading.ids))
        outdated = ""
        if newest > self._last_generation:
            outdated = "its end is gone: it is older than its mark"
        elif mark is not None and mark.inode == state.inode and mark.committed_bytes > state.committed_bytes:
            outdated = f"its end is gone: it knows of {state.committed_bytes} bytes, not {mark.committed_bytes}"
        return LastRun(state, reading.clean, outdated)

    def seen(self, id: bytes) -> bool:
        return id in self._ids

    def __len__(self) -> int:
        return len(self._order) // ID_BYTES

    def commit(self, state: FileState, ids: Sequence[bytes] = (), clean: bool = False) -> None:
        """Make `state` and new `ids` (16 bytes each) durable, then remember them.

        Raise OSError if the commit may or may not be on disk; repeat the same call until it succeeds. Raise TakenOver
        when another run has begun; this one must then touch nothing and ack nothing.
        """
        last, packed = self._mark.last, b"".join(ids)
        if last is not None and not (last.inode == state.inode and last.committed_bytes <= state.committed_bytes):
            # The mark must never be ahead of the journal, not even after a power cut.
            self._mark.write(Mark(state.inode, state.committed_bytes, self._last_generation), self.mode, sync=True)
        if not (self._has_room() and self._append(commit_line(state, packed, clean, self._prefetch_count))):
            self._replace(state, packed, clean)
        self._remember(ids, packed)
        self._last_generation = self._generation
        with suppress(OSError):  # an older mark does no harm
            self._mark.write(Mark(state.inode, state.committed_bytes, self._generation), self.mode)

    def set_mode(self, mode: int) -> None:
        """Give the files that are there, and all later ones, these permission bits."""
        self.mode = mode
        if self._fd >= 0:
            with naming(self.path):
                os.fchmod(self._fd, mode)
        self._mark.set_mode(mode)

    def set_aside(self) -> str:
        """Rename the journal on disk, which is corrupt or outdated; return its new name."""
        aside = free_name(f"{self.path}.corrupt-")
        os.rename(self.path, aside)
        sync_directory(aside)
        self._place = None
        return aside

    def check(self) -> None:
        """Raise TakenOver when another run has begun, OSError when that cannot be known."""
        if self._is_untouched():
            return
        reading = Reading(self.path, 0, 0)
        with suppress(FileNotFoundError, JournalCorrupt):  # also of a damaged one, as far as it can be read
            read_journal(reading)
        if reading.generation > self._generation:
            raise TakenOver(
                f"{self.path}: another consumer has begun to write the same CSV, although this one has its lock (the "
                "lock file was removed, or flock has no effect on this file system): this one stops, and acks nothing"
            )

    def close(self) -> None:
        self._close_file()
        self._mark.close()

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _remember(self, ids: Sequence[bytes], packed: bytes) -> None:
        self._ids.update(ids)
        self._order += packed
        if (over := len(self._order) - ID_BYTES * self.window) > 0:
            self._ids.difference_update(split_ids(self._order[:over]))
            del self._order[:over]
        self._uncounted += len(ids)
        while self._uncounted > (eighth := self.window // _EIGHTHS):
            self._uncounted -= eighth + 1
            self._eighths.append(time.monotonic())
            if len(self._eighths) > _EIGHTHS:
                self.window_seconds = self._eighths[-1] - self._eighths[0]

    def _has_room(self) -> bool:
        """Tell whether the journal is open and has not grown too much."""
        limit_bytes = _LEAST_ROOM_BYTES + 2 * (2 * ID_BYTES * self.window)
        return self._fd >= 0 and self._place is not None and self._place[2] < limit_bytes

    def _fence(self, file: BinaryIO, reading: Reading) -> None:
        """Write the fence of this run, and take what was committed before it."""
        fence, fd = fence_line(self._generation), file.fileno()
        position = os.lseek(fd, 0, os.SEEK_CUR)
        write_all(fd, b"\n" + fence)  # a torn commit may come before it
        os.fsync(fd)
        os.lseek(fd, position, os.SEEK_SET)  # appending has moved it
        if not read_lines(file, reading, fence):
            raise OSError(errno.EBUSY, "was changed while it was read")
        status = os.fstat(fd)
        self._place = status.st_dev, status.st_ino, file.tell()

    def _is_untouched(self) -> bool:
        """Tell whether the journal is as this run left it."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return self._place is None
        return (status.st_dev, status.st_ino, status.st_size) == self._place

    def _append(self, line: bytes) -> bool:
        """Append a commit; return whether the journal is as this run left it. Raise OSError and TakenOver."""
        assert self._place is not None
        device, inode, size = self._place
        try:
            with naming(self.path):
                write_all(self._fd, line)
                os.fsync(self._fd)
        except OSError:
            self._failed = True
            self._close_file()
            raise
        self._place = device, inode, size + len(line)
        untouched = self._is_untouched()
        if not untouched:
            self.check()
        return untouched

    def _replace(self, state: FileState, ids: bytes, clean: bool) -> None:
        """Write a new journal: the ids that stay in the window, then the commit."""
        self._close_file()
        self._mark.close()  # its folder may be a new one
        new = f"{self.path}.new"
        fd = open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, self.mode)
        try:
            with naming(self.path):
                generation: int | None = self._generation
                first = max(0, len(self._order) + len(ids) - ID_BYTES * self.window)
                for at in range(first, len(self._order), ID_BYTES * _LINE_IDS):
                    some = self._order[at : at + ID_BYTES * _LINE_IDS]
                    write_all(fd, ids_line(state, some, self._prefetch_count, generation))
                    generation = None
                write_all(fd, commit_line(state, ids, clean, self._prefetch_count, generation))
                os.fsync(fd)
                if not self._is_untouched():
                    self.check()
                    if not self._failed:
                        text = "%s: another program changed or removed it; it is written again, whole"
                        self._log.warning(text, self.path)
                os.rename(new, self.path)
                sync_directory(self.path)
        except (OSError, TakenOver):
            self._failed = True
            os.close(fd)
            with suppress(OSError):
                os.unlink(new)
            raise
        self._fd, self._failed = fd, False
        status = os.fstat(fd)
        self._place = status.st_dev, status.st_ino, status.st_size


def read_journal(reading: Reading) -> None:
    """Take what a journal says now, without a fence. Raise OSError, and as Reading.take does."""
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
