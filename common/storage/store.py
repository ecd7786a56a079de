"""The exactly-once step: rows into the CSV, then its committed length and the message ids into the journal.

Store.open() recovers from what a crash, a person or another program left. Store.append() is the durable step after
which the caller acks. Committed rows are never touched, and nothing is destroyed: bytes that must leave the CSV move to
`<csv>.uncommitted-<UTC time>`. Everything is synchronous and for one thread. The caller decides when to append, retry
or rotate.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from common.errors import TakenOver
from common.event.rows import CSV_HEADER
from common.storage.csv_file import CsvFile
from common.storage.files import NO_SPACE, explain_os_error, free_name, make_directory, startup_error
from common.storage.journal import ID_BYTES, Journal
from common.storage.lock import Lock
from common.storage.packer import Packer, clean_up, rotated_files
from common.storage.recovery import decide
from common.storage.repair import adopt, apply, is_intact, load, look
from common.storage.state import CHUNK_BYTES, FileState


class Timing(NamedTuple):
    """Seconds that one append spent in each step; 0.0 for a step that an earlier attempt has done."""

    write_seconds: float
    fsync_seconds: float
    commit_seconds: float


def _boot_seconds() -> float:
    """Read a clock that cannot be set, and that also runs while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Store:
    """A CSV, its journal and its lock."""

    def __init__(
        self,
        csv_path: str,
        file: CsvFile,
        state: FileState,
        journal: Journal,
        rotate_gzip: bool,
        lock: Lock | None,
        log: logging.Logger,
    ) -> None:
        """Take over what Store.open() has recovered."""
        self._csv_path = csv_path  # as configured: it may be a link, which may be re-pointed
        self._file = file
        self._state = state  # what the journal says
        self._synced: FileState | None = None  # what it must say next, when rows are on disk and their commit failed
        self._journal = journal
        self._lock = lock
        self._log = log
        self._rotate_gzip = rotate_gzip
        self._packer = Packer(log)
        self._began = 0.0  # when its first row, or the file itself, was written, by _boot_seconds
        self._set_age()

    @classmethod
    def open(
        cls,
        csv_path: str,
        dedup_window: int,
        prefetch_count: int,
        log: logging.Logger,
        rotate_gzip: bool = False,
        lock: Lock | None = None,
    ) -> Store:
        """Recover the CSV and its journal. Log in one line what was found and done.

        The caller holds the `lock`; the store makes it again when the file moves, and releases it when it is closed.
        Raise DiskTrouble if a retry may work, and StartupError if the file is not predlog's or cannot be written.
        """
        path = os.path.realpath(csv_path)
        journal = Journal(f"{path}.journal", dedup_window, prefetch_count, log)
        notes: list[str] = []
        try:
            clean_up(path)
            file, state = _recover(path, journal, (), notes)
            packed = set(os.listdir(os.path.dirname(path)))
            plain = [each for each in rotated_files(path) if rotate_gzip or f"{os.path.basename(each)}.gz" in packed]
        except OSError as error:
            journal.close()
            raise startup_error(error, path, notes) from error
        level = logging.WARNING if notes else logging.INFO
        notes.append(f"continues after {state.committed_bytes} bytes, with {len(journal)} message ids remembered")
        log.log(level, "%s: %s", path, "; ".join(notes))
        store = cls(csv_path, file, state, journal, rotate_gzip, lock, log)
        for each in plain:  # left by an earlier run, perhaps next to its .gz
            store._packer.put(each)
        return store

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def committed_bytes(self) -> int:
        """The length of the current CSV, header included."""
        return self._state.committed_bytes

    @property
    def has_rows(self) -> bool:
        return self.committed_bytes > len(CSV_HEADER)

    @property
    def age_seconds(self) -> float:
        """Seconds since the first row of the current CSV, or else since it was begun or taken over, over all runs.

        A wall clock that is set back adds nothing, whether the consumer is down or running.
        """
        return _boot_seconds() - self._began

    def seen(self, id: bytes) -> bool:
        """Tell whether the message with this id (16 bytes) is committed, within the window."""
        return self._journal.seen(id)

    def expect_again(self, events: int) -> None:
        """Keep the ids of so many events that the broker can deliver again, and of as many that come meanwhile."""
        self._journal.expect_again(events)

    def window_seconds(self) -> float | None:
        """Return the age of the oldest id, in seconds, if ids are forgotten; else None."""
        return None

    def append(self, data: bytes, ids: Sequence[bytes]) -> Timing:
        """Make whole rows `data` and the new, distinct `ids` (16 bytes each) of their messages durable, as one.

        Raise OSError when a step fails. The caller then acks nothing and repeats the call with the same arguments until
        it succeeds, which continues from the step that failed. It takes two fsyncs, and a third when the journal is
        rewritten.
        """
        if sum(map(len, ids)) != ID_BYTES * len(ids):
            raise ValueError(f"an id is not {ID_BYTES} bytes")
        began = written = synced = time.perf_counter()
        if self._synced is None and data:
            self._check_file(data)
            began = time.perf_counter()
            try:
                self._file.write(data)
                written = time.perf_counter()
                self._file.sync()
                synced = time.perf_counter()
                if self._file.size() != self.committed_bytes + len(data):
                    raise OSError(errno.EBUSY, "another program wrote to it at the same moment", self.path)
            except OSError as error:
                self._make_room(error)
                with suppress(OSError):
                    self._cut_own(data)
                raise
        state = self._state
        if data:
            end = state.committed_bytes + len(data)
            chunk = memoryview(data)[-CHUNK_BYTES:]
            state = replace(state, committed_bytes=end, chunk_offset=end - len(chunk), chunk_crc32=zlib.crc32(chunk))
            if not self.has_rows and self._synced is None:
                self._began = _boot_seconds()  # its age counts from its first row
        state = self._with_age(state) if self._synced is None else replace(state, started_at=self._synced.started_at)
        if self._synced not in (None, state):
            raise ValueError("the batch before is not committed yet")
        self._synced = state  # from here on the rows stay, since a failed commit may be on disk
        try:
            self._journal.commit(state, ids)
        except OSError as error:
            self._make_room(error)
            raise
        self._state, self._synced = state, None
        return Timing(written - began, synced - written, time.perf_counter() - synced)

    def reopen(self) -> None:
        """Start a new file if the current one was renamed or removed, as append would. Raise OSError."""
        if self._synced is None:
            self._check_file(b"")

    def rotate(self) -> str | None:
        """Rename data.csv to data-<UTC time>.csv, start a new data.csv, and return the new name of the old one.

        Return None if there are no rows, or a failed append must be repeated first. Raise OSError; the next append or
        rotate then continues in a new file.
        """
        if self._synced is not None:
            return None
        self._check_file(b"")
        if not self.has_rows:
            return None
        self._journal.check()
        stem, suffix = os.path.splitext(self.path)
        rotated = free_name(f"{stem}-", suffix)
        os.rename(self.path, rotated)
        self._start_file(logging.INFO, f"rotated to {rotated}")
        if self._rotate_gzip:
            self._packer.put(rotated)
        return rotated

    def close(self) -> None:
        """Mark the journal clean if everything is committed; close the files and release the lock."""
        self._packer.close()
        self._give_up_files()

    def _give_up_files(self) -> None:
        try:
            if self._synced is None and self._file.size() == self.committed_bytes:
                self._journal.commit(self._with_age(self._state), clean=True)
        except OSError as error:
            self._log.warning("%s", explain_os_error(error, self._journal.path))
        except TakenOver:
            pass  # the journal belongs to another run; append has raised it, or will not be called again
        self._file.close()
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def _make_room(self, error: OSError) -> None:
        if error.errno in NO_SPACE:
            self._packer.give_way()

    def _with_age(self, state: FileState) -> FileState:
        """Return `state` with the age of the file in terms of the current wall clock, for the next run."""
        return replace(state, started_at=round(time.time() - self.age_seconds, 3))

    def _set_age(self) -> None:
        self._began = _boot_seconds() - max(0.0, time.time() - self._state.started_at)

    def _check_file(self, data: bytes) -> None:
        """Make sure, in two system calls, that the file at the path is ours and ends at the committed bytes."""
        committed = self.committed_bytes
        in_place = self._file.is_at(self._csv_path)
        if in_place and self._file.size() == committed:
            return
        self._journal.check()  # the change may be another consumer's
        size = self._cut_own(data)
        if not in_place:
            self._follow()
        elif size > committed and is_intact(self._file, size, self._state):
            aside = self._file.set_aside(committed)
            self._log.warning("%s: %d bytes of another program were moved to %s", self.path, size - committed, aside)
        elif size != committed:
            note = f"was truncated or changed by another program: {committed} bytes were committed, {size} are there"
            self._start_file(logging.WARNING, note)

    def _cut_own(self, data: bytes) -> int:
        """Cut what a failed write of `data` left behind the committed bytes; return the size."""
        end = self.committed_bytes
        size = self._file.size()
        if end < size <= end + len(data) and b"".join(self._file.read(end, size)) == data[: size - end]:
            self._journal.check()
            self._file.cut(end)
            return end
        return size

    def _follow(self) -> None:
        """Change to the file that the path leads to now."""
        path = os.path.realpath(self._csv_path)
        make_directory(os.path.dirname(path))
        if path == self.path:
            if self._lock is not None:
                self._lock.renew()
            self._start_file(logging.WARNING, "was renamed, removed or replaced")
        else:
            self._move_to(path)

    def _move_to(self, path: str) -> None:
        """Continue in a file elsewhere, with its own journal, which takes over the ids."""
        lock = Lock(path)
        if not lock.acquire():
            raise OSError(errno.EBUSY, "is in use by another consumer", path)
        journal = self._journal.at(f"{path}.journal")
        notes = [f"{self._csv_path} leads here now, and no longer to {self.path}"]
        try:
            file, state = _recover(path, journal, self._journal.ids(), notes)
        except BaseException:
            journal.close()
            lock.release()
            raise
        self._give_up_files()
        self._file, self._state, self._journal, self._lock = file, state, journal, lock
        self._set_age()
        notes.append(f"continues after {state.committed_bytes} bytes")
        self._log.warning("%s: %s", path, "; ".join(notes))

    def _start_file(self, level: int, note: str) -> None:
        """Change to the file at the path, or to a new one. The journal knows it before it gets a row."""
        notes = [note]
        old = self._file
        file = old if old.is_at(self.path) else CsvFile(self.path)
        try:
            state = adopt(file, notes)
            self._journal.commit(state)
        except BaseException:
            if file is not old:
                file.close()
            raise
        if file is not old:
            old.close()
        self._file, self._state = file, state
        self._set_age()
        self._log.log(level, "%s: %s; continues after %d bytes", self.path, "; ".join(notes), state.committed_bytes)


def _recover(path: str, journal: Journal, ids: Iterable[bytes], notes: list[str]) -> tuple[CsvFile, FileState]:
    """Open the CSV, recover, and begin a run in its journal, which also takes over `ids`. Raise OSError."""
    existed = os.path.lexists(path)
    file = CsvFile(path)
    try:
        last_run = load(journal)
        state = apply(decide(last_run, look(file, existed, last_run)), file, journal, notes)
        journal.remember(ids)
        journal.commit(state)
    except BaseException:
        file.close()
        raise
    return file, state
