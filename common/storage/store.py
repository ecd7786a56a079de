"""The exactly-once step: rows into the CSV, then its committed length and the message ids into the journal.

Store.open() recovers from what a crash, a person or another program left. Store.append() is the durable step after
which the caller acks. Committed rows are never touched, and nothing is destroyed: bytes that must leave the CSV move to
`<csv>.uncommitted-<UTC time>`. Everything is synchronous, for one thread. Its owner decides when to do what.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape, glob
from threading import Thread
from typing import NamedTuple

from common.errors import TakenOver
from common.event.rows import CSV_HEADER
from common.storage import rotation
from common.storage.csv_file import CHUNK_BYTES, CsvFile
from common.storage.files import explain_os_error, make_directory, mode_of, startup_error
from common.storage.journal import Journal
from common.storage.lock import Lock
from common.storage.records import ID_BYTES
from common.storage.recovery import FileFacts, FileState, LastRun, decide
from common.storage.repair import adopt, apply, is_intact


class Timing(NamedTuple):
    """Seconds that one append spent in each step; 0.0 for a step that an earlier attempt has done."""

    write_seconds: float
    fsync_seconds: float
    commit_seconds: float


@dataclass(eq=False)
class Store:
    """A CSV and its journal. Made by Store.open()."""

    _csv_path: str  # as configured: it may be a link
    _file: CsvFile
    _state: FileState  # what the journal says
    _journal: Journal
    _log: logging.Logger
    _rotate_gzip: bool
    _lock: Lock | None
    _rotate_keep: int
    # Rows that are on disk, and stay, since their commit may be on disk too: it is repeated until it succeeds.
    _uncommitted: tuple[bytes, FileState] | None = None

    @classmethod
    def open(
        cls,
        csv_path: str,
        dedup_window: int,
        prefetch_count: int,
        log: logging.Logger,
        rotate_gzip: bool = False,
        lock: Lock | None = None,
        rotate_keep: int = 0,
    ) -> Store:
        """Recover the CSV and its journal. Log in one line what was found and done.

        The caller holds the `lock`; the store releases it when it is closed. The latest `rotate_keep` rotated files are
        kept, or all of them if it is 0. Raise DiskTrouble if a retry can help, and StartupError if the file is not
        predlog's or cannot be written.
        """
        path = os.path.realpath(csv_path)
        journal = Journal(path, dedup_window, prefetch_count)
        notes: list[str] = []
        try:
            file, state = _recover(path, journal, notes)
        except OSError as error:
            journal.close()
            raise startup_error(error, path, notes) from error
        level = logging.WARNING if notes else logging.INFO
        notes.append(f"continues after {state.committed_bytes} bytes, with {len(journal)} message ids remembered")
        log.log(level, "%s: %s", path, "; ".join(notes))
        store = cls(csv_path, file, state, journal, log, rotate_gzip, lock, rotate_keep)
        store._tend_rotated()
        return store

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def committed_bytes(self) -> int:
        """The committed length of the current CSV, header included."""
        return self._state.committed_bytes

    @property
    def has_rows(self) -> bool:
        return self.committed_bytes > len(CSV_HEADER)

    @property
    def window_seconds(self) -> float | None:
        """How long the ids of the last full window took to come; None until this run has committed as many."""
        return self._journal.window_seconds

    def period_due(self, rotate_interval_seconds: int) -> bool:
        """Return whether there are rows of another period than the current one (rotation.py); 0 is off."""
        return self.has_rows and rotation.period_due(self._state.started_at, time.time(), rotate_interval_seconds)

    def seen(self, id: bytes) -> bool:
        """Return whether the message with this id (16 bytes) is committed, within the window."""
        return self._journal.seen(id)

    def expect_again(self, events: int) -> None:
        """Keep the ids of `events` events that the broker can deliver again, and of as many that come meanwhile."""
        self._journal.expect_again(events)

    def append(self, data: bytes, ids: Sequence[bytes]) -> Timing:
        """Make whole rows `data` and the new, distinct `ids` (16 bytes each) of their messages durable, as one.

        Raise OSError when a step fails. The caller then acks nothing and repeats the call with the same arguments until
        it succeeds, which continues from the step that failed. It takes two fsyncs, or three with a new journal.
        """
        if sum(map(len, ids)) != ID_BYTES * len(ids):
            raise ValueError(f"an id is not {ID_BYTES} bytes")
        write_seconds = fsync_seconds = 0.0
        if self._uncommitted is None:
            if data:
                write_seconds, fsync_seconds = self._write(data)
            self._uncommitted = data, self._state_after(data)
        elif self._uncommitted[0] != data:
            raise ValueError("the batch before is not committed yet")
        state, began = self._uncommitted[1], time.perf_counter()
        self._journal.commit(state, ids)
        self._state, self._uncommitted = state, None
        return Timing(write_seconds, fsync_seconds, time.perf_counter() - began)

    def reopen(self) -> None:
        """Start a new file if the current one was renamed or removed, as append would. Raise OSError.

        Only the next start follows a link that was re-pointed.
        """
        if (target := os.path.realpath(self._csv_path)) != self.path:
            self._log.warning("%s leads to %s now; rows go to %s until a restart", self._csv_path, target, self.path)
        if self._uncommitted is None:
            self._check_file(b"")

    def rotate(self) -> str | None:
        """Rename data.csv to data-<UTC time>.csv, start a new data.csv, and return the new name of the old one.

        Return None if there are no rows, or a failed append must be repeated first. Raise OSError; the next append or
        rotate then continues in a new file.
        """
        if self._uncommitted is not None:
            return None
        self._check_file(b"")
        if not self.has_rows:
            return None
        self._journal.check()
        rotated = rotation.new_name(self.path)
        os.rename(self.path, rotated)
        self._start_file(logging.INFO, f"rotated to {rotated}")
        self._tend_rotated()
        return rotated

    def close(self) -> None:
        """Mark the journal clean if everything is committed; close the files and release the lock."""
        try:
            if self._uncommitted is None and self._file.size() == self.committed_bytes:
                self._journal.commit(self._state, clean=True)
        except OSError as error:
            self._log.warning("%s", explain_os_error(error, self._journal.path))
        except TakenOver:
            pass  # the journal belongs to another run; append has raised it, or will not be called again
        self._file.close()
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def _write(self, data: bytes) -> tuple[float, float]:
        """Write rows and sync them, or leave the file as it was; return the seconds of both steps. Raise OSError."""
        self._check_file(data)
        began = time.perf_counter()
        try:
            self._file.write(data)
            written = time.perf_counter()
            self._file.sync()
            synced = time.perf_counter()
            end = self.committed_bytes + len(data)
            if (size := self._file.size()) != end:
                if size < end and not is_intact(self._file, self._state):  # truncated just before the write
                    self._cut_own(data, size - len(data))
                raise OSError(errno.EBUSY, "another program wrote to it at the same moment", self.path)
        except OSError:
            with suppress(OSError):
                self._cut_own(data, self.committed_bytes)
            raise
        return written - began, synced - written

    def _state_after(self, data: bytes) -> FileState:
        """Return the state of the file with `data` at its end."""
        if not data:
            return self._state
        device, inode, committed_bytes, _, _, started_at = self._state
        if not self.has_rows:
            started_at = round(time.time(), 3)
        end, chunk = committed_bytes + len(data), memoryview(data)[-CHUNK_BYTES:]
        return FileState(device, inode, end, end - len(chunk), zlib.crc32(chunk), started_at)

    def _check_file(self, data: bytes) -> None:
        """Make sure that the file at the path is ours and ends at the committed bytes."""
        committed = self.committed_bytes
        size, mode = self._file.size_and_mode()
        self._journal.set_mode(mode)  # for its successor, also after a crash
        in_place = self._file.is_at(self.path)
        if in_place and size == committed:
            return
        self._journal.check()  # the change may be another consumer's
        size = self._cut_own(data, committed)
        if not in_place:
            make_directory(os.path.dirname(self.path))
            self._start_file(logging.WARNING, "was renamed, removed or replaced")
        elif size > committed and is_intact(self._file, self._state):
            aside = self._file.set_aside(committed)
            self._log.warning("%s: %d bytes from another program were moved to %s", self.path, size - committed, aside)
        elif size != committed:
            self._start_file(logging.WARNING, f"was truncated or changed: {committed} bytes were committed, not {size}")

    def _cut_own(self, data: bytes, end: int) -> int:
        """Cut what a failed write of `data` left after `end`; return the size."""
        size = self._file.size()
        if 0 <= end < size <= end + len(data) and b"".join(self._file.read(end, size)) == data[: size - end]:
            self._journal.check()
            self._file.cut(end)
            return end
        return size

    def _start_file(self, level: int, note: str) -> None:
        """Change to the file at the path, or to a new one. The journal knows it before it gets a row."""
        notes = [note]
        old = self._file
        file = old if old.is_at(self.path) else CsvFile(self.path, self._journal.mode)
        try:
            state = adopt(file, notes)
            self._journal.set_mode(file.size_and_mode()[1])
            self._journal.commit(state)
        except BaseException:
            if file is not old:
                file.close()
            raise
        if file is not old:
            old.close()
        self._file, self._state = file, state
        self._log.log(level, "%s: %s; continues after %d bytes", self.path, "; ".join(notes), state.committed_bytes)

    def _tend_rotated(self) -> None:
        if self._rotate_keep or self._rotate_gzip:
            what = self.path, self._rotate_keep, self._rotate_gzip, self._log
            Thread(target=rotation.tend, args=what, name="rotated", daemon=True).start()  # no process waits for it


def _recover(path: str, journal: Journal, notes: list[str]) -> tuple[CsvFile, FileState]:
    """Open the CSV, recover, and begin a run in its journal. Raise OSError."""
    file = CsvFile(path, mode_of(journal.path))
    try:
        file.check_header()
        _remove_leftovers(path)
        journal.set_mode(file.size_and_mode()[1])
        last_run = journal.load()
        intact = isinstance(last_run, LastRun) and is_intact(file, last_run.state)
        plan = decide(last_run, FileFacts(file.device, file.inode, file.size(), intact))
        state = apply(plan, file, journal, notes)
        journal.commit(state)
    except BaseException:
        file.close()
        raise
    return file, state


def _remove_leftovers(csv_path: str) -> None:
    """Remove temporary files that a crash left, and what only predlog 1.0 used. Raise OSError."""
    stem, suffix = map(escape, os.path.splitext(csv_path))
    patterns = [f"{stem}{suffix}{end}" for end in ("*.gz.part", ".uncommitted-*.part", ".journal.new", ".journal.mark")]
    for pattern in [*patterns, f"{stem}-[0-9]*T[0-9]*Z*{suffix}.gz.part"]:
        for path in glob(pattern):
            os.unlink(path)
