"""The exactly-once step: rows into the CSV, then its committed length and the message ids into the journal.

Store.open() recovers from whatever a crash, a person or another program left. Store.append() is the durable step after
which the caller acks. Committed rows are never touched, and nothing is destroyed: bytes that must leave the CSV move to
`<csv>.uncommitted-<UTC time>`. Everything is synchronous and for one thread. When to flush, retry or rotate is the
caller's decision.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import NamedTuple

from common.event.rows import CSV_HEADER
from common.storage.csv_file import CsvFile
from common.storage.files import compress, explain_os_error, free_name, startup_error
from common.storage.journal import ID_BYTES, Journal
from common.storage.recovery import decide
from common.storage.repair import adopt, apply, is_intact, load, look
from common.storage.state import CHUNK_BYTES, FileState


class Timing(NamedTuple):
    """Seconds that one append spent in each step; 0.0 for a step that an earlier try has done."""

    write_seconds: float
    fsync_seconds: float
    commit_seconds: float


class Store:
    def __init__(self, file: CsvFile, state: FileState, journal: Journal, log: logging.Logger) -> None:
        """Use Store.open()."""
        self._file = file
        self._state = state  # what the journal says
        self._synced: FileState | None = None  # what it must say next: rows are on disk, their commit failed
        self._journal = journal
        self._aging: tuple[float, float] | None = None  # started_at, and the same moment by the monotonic clock
        self._log = log
        self._to_compress: SimpleQueue[str | None] | None = None  # None ends the thread

    @classmethod
    def open(
        cls, csv_path: str, dedup_window: int, prefetch_count: int, log: logging.Logger, rotate_gzip: bool = False
    ) -> Store:
        """Recover the CSV and its journal; the caller holds the Lock. Say in one log line what was found and done.

        Raise DiskTrouble when a later try may work, and StartupError when the file is not ours to write, or cannot be
        written.
        """
        path = os.path.realpath(csv_path)
        journal = Journal(f"{path}.journal", dedup_window, prefetch_count, log)
        notes: list[str] = []
        file = None
        try:
            last_run = load(journal)
            existed = os.path.lexists(path)
            file = CsvFile(path)
            state = apply(decide(last_run, look(file, existed, last_run)), file, journal, notes)
            state = replace(state, started_at=min(state.started_at, time.time()))  # the clock was set back
            journal.commit(state)
        except OSError as error:
            journal.close()
            if file is not None:
                file.close()
            raise startup_error(error, path, notes) from error
        level = logging.WARNING if notes else logging.INFO
        notes.append(f"continues after {state.committed_bytes} bytes, with {len(journal)} message ids remembered")
        log.log(level, "%s: %s", path, "; ".join(notes))
        store = cls(file, state, journal, log)
        if rotate_gzip:
            store._start_compressing()
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
    def started_at(self) -> float:
        """Unix time of the first row of the current CSV, or of its beginning (or taking over), also across restarts."""
        return self._state.started_at

    @property
    def age_seconds(self) -> float:
        """The time since `started_at`. The wall clock is asked once for each file: somebody may set it."""
        started_at = self.started_at
        if self._aging is None or self._aging[0] != started_at:
            self._aging = started_at, time.monotonic() - max(0.0, time.time() - started_at)
        return time.monotonic() - self._aging[1]

    def seen(self, id: bytes) -> bool:
        """Tell whether the message with this id (16 bytes) is committed, within the window."""
        return self._journal.seen(id)

    def append(self, data: bytes, ids: Sequence[bytes]) -> Timing:
        """Make whole rows `data` and the new, distinct `ids` (16 bytes each) of their messages durable, as one.

        Raise OSError when a step fails. The caller then acks nothing and calls again, with the same arguments, until
        it works: that continues from the step that failed. Two fsyncs; a third when the grown journal is written anew.
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
            except OSError:
                with suppress(OSError):
                    self._cut_own(data)
                raise
        state = self._state
        if data:
            end = state.committed_bytes + len(data)
            chunk = memoryview(data)[-CHUNK_BYTES:]
            state = replace(state, committed_bytes=end, chunk_offset=end - len(chunk), chunk_crc32=zlib.crc32(chunk))
            if not self.has_rows:  # its age counts from its first row
                began_at = round(time.time(), 3) if self._synced is None else self._synced.started_at
                state = replace(state, started_at=began_at)
        if self._synced not in (None, state):
            raise ValueError("the batch before is not committed yet")
        self._synced = state  # from here on the rows stay: the commit may be on disk even when it fails
        self._journal.commit(state, ids)
        self._state, self._synced = state, None
        return Timing(written - began, synced - written, time.perf_counter() - synced)

    def reopen(self) -> None:
        """Start a new file now if the current one was renamed or removed, as append would. Raise OSError."""
        if self._synced is None:
            self._check_file(b"")

    def rotate(self) -> str | None:
        """Rename data.csv to data-<UTC time>.csv, start a new data.csv, and return the new name of the old one.

        Return None when there is no row to rotate, or a failed append is not settled yet. Raise OSError; append, or
        rotate again, then continues in a new file.
        """
        if self._synced is not None:
            return None
        self._check_file(b"")
        if not self.has_rows:
            return None
        stem, suffix = os.path.splitext(self.path)
        rotated = free_name(f"{stem}-", suffix)
        os.rename(self.path, rotated)
        self._start_file(logging.INFO, f"rotated to {rotated}")
        if self._to_compress:
            self._to_compress.put(rotated)
        return rotated

    def close(self) -> None:
        """Mark the journal clean if everything is settled, and give up the files."""
        try:
            if self._synced is None and self._file.size() == self.committed_bytes:
                self._journal.commit(self._state, clean=True)
        except OSError as error:
            self._log.warning("%s", explain_os_error(error, self._journal.path))
        if self._to_compress:
            self._to_compress.put(None)
        self._file.close()
        self._journal.close()

    def _check_file(self, data: bytes) -> None:
        """Before a write: make sure that the file at our path is ours and ends where we left it. Two system calls."""
        committed = self.committed_bytes
        size = self._cut_own(data)
        if not self._file.in_place():
            self._start_file(logging.WARNING, "was renamed, removed or replaced")
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
            self._file.cut(end)
            return end
        return size

    def _start_file(self, level: int, note: str) -> None:
        """Change to the file that is at our path now, or to a new one. The journal knows it before it gets a row."""
        notes = [note]
        old = self._file
        file = old if old.in_place() else CsvFile(self.path)
        try:
            state = adopt(file, notes)
            self._journal.commit(state)
        except OSError:
            if file is not old:
                file.close()
            raise
        if file is not old:
            old.close()
        self._file, self._state = file, state
        self._log.log(level, "%s: %s; continues after %d bytes", self.path, "; ".join(notes), state.committed_bytes)

    def _start_compressing(self) -> None:
        """Compress rotated files in a thread of its own, first those that an earlier run left plain."""
        queue = self._to_compress = SimpleQueue[str | None]()
        folder, name = os.path.split(self.path)
        stem, suffix = os.path.splitext(name)
        rotated = re.compile(re.escape(stem) + r"-\d{8}T\d{6}Z(-\d+)?" + re.escape(suffix))
        for entry in sorted(os.listdir(folder)):
            if rotated.fullmatch(entry):
                queue.put(os.path.join(folder, entry))

        def run() -> None:
            while path := queue.get():
                try:
                    compress(path)
                except OSError as error:
                    self._log.warning("%s; it stays as it is until the next start", explain_os_error(error, path))

        threading.Thread(target=run, name="gzip", daemon=True).start()
