"""The exactly-once step: rows into the CSV, then its committed length and the message ids into the journal.

Store.open() recovers whatever a crash, a person or another program left; Store.append() is the durable step after which
the caller acks. What is committed is never touched, and nothing is ever destroyed: bytes that must go from the CSV move
to `<csv>.uncommitted-<UTC time>`. Everything is synchronous and for one thread; when to flush, retry or rotate is the
caller's.
"""

from __future__ import annotations

import errno
import fcntl
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

from common.csv_file import CsvFile, compress, free_name, make_directory, sync_directory
from common.errors import DiskTrouble, StartupError
from common.event.rows import CSV_HEADER
from common.journal import ID_BYTES, FileState, Journal, JournalCorrupt

_MAY_END = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

CHUNK_BYTES = 64 << 10  # how much of the committed end is kept as a checksum to know the file again


class Timing(NamedTuple):
    """Seconds that one append spent in each step; 0.0 for a step that an earlier try had done."""

    write_seconds: float
    fsync_seconds: float
    commit_seconds: float


class Lock:
    """One consumer per CSV: flock on `<csv>.lock`, which ends with the process, however it ends."""

    def __init__(self, csv_path: str) -> None:
        self.path = os.path.realpath(csv_path) + ".lock"
        self._fd = -1

    def acquire(self) -> bool:
        """Takes the lock, or returns False at once when another has it. Makes the folder. Raises as Store.open."""
        try:
            make_directory(os.path.dirname(self.path))
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _trouble(error, self.path) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as error:
            os.close(fd)
            raise StartupError(_explain(error, self.path)) from error
        self._fd = fd
        with suppress(OSError):  # the pid is only for people
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return True

    def release(self) -> None:
        """Gives the lock up. The file stays: were it removed, two processes could each hold a lock of that name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Store:
    def __init__(self, file: CsvFile, state: FileState, journal: Journal, log: logging.Logger) -> None:
        """Use Store.open()."""
        self._file = file
        self._state = state  # what the journal says
        self._synced: FileState | None = None  # what it must say next: rows are on disk, their commit failed
        self._journal = journal
        self._log = log
        self._to_compress: SimpleQueue[str | None] | None = None  # None ends the thread

    @classmethod
    def open(
        cls, csv_path: str, dedup_window: int, prefetch_count: int, log: logging.Logger, rotate_gzip: bool = False
    ) -> Store:
        """Recovers the CSV and its journal; the caller holds the Lock. Says in one log line what was found and done.

        Raises DiskTrouble when a later try may work, and StartupError when the file is not ours to write, or cannot be
        written.
        """
        path = os.path.realpath(csv_path)
        journal = Journal(f"{path}.journal", dedup_window, prefetch_count, log)
        notes: list[str] = []
        file = None
        try:
            left = _load(journal, notes)
            existed = os.path.lexists(path)
            file = CsvFile(path)
            # Of the same age as the CSV, an older journal is as good as any: both were put back.
            if left is not None and journal.end_is_gone and file.size() != left[0].committed_bytes:
                _set_journal_aside(journal, journal.end_is_gone, notes)
                left = None
            state = _recover(file, existed, left, notes)
            journal.commit(state)
        except OSError as error:
            journal.close()
            if file is not None:
                file.close()
            raise _trouble(error, path, notes) from error
        level = logging.WARNING if notes else logging.INFO
        notes.append(f"goes on after {state.committed_bytes} bytes, with {len(journal)} message ids remembered")
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

    def seen(self, id: bytes) -> bool:
        """Whether the message with this id (16 bytes) is committed, within the window."""
        return self._journal.seen(id)

    def append(self, data: bytes, ids: Sequence[bytes]) -> Timing:
        """Makes whole rows `data` and the new, distinct `ids` (16 bytes each) of their messages durable, as one.

        Raises OSError when a step fails. The caller then acks nothing and calls again, with the same arguments, until
        it works: that goes on from the step that failed. Two fsyncs; a third when the grown journal is written anew.
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
        """Starts a new file now when the current one was renamed or removed, as append would. Raises OSError."""
        if self._synced is None:
            self._check_file(b"")

    def rotate(self) -> str | None:
        """Renames data.csv to data-<UTC time>.csv, starts a new data.csv, and returns the new name of the old one.

        None when there is no row to rotate, or a failed append is not settled yet. Raises OSError; append, or rotate
        again, then goes on in a new file.
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
        """Marks the journal clean, when all is settled."""
        try:
            if self._synced is None and self._file.size() == self.committed_bytes:
                self._journal.commit(self._state, clean=True)
        except OSError as error:
            self._log.warning("%s", _explain(error, self._journal.path))
        if self._to_compress:
            self._to_compress.put(None)
        self._file.close()
        self._journal.close()

    def _check_file(self, data: bytes) -> None:
        """Before a write: the file ends where we left it, and is the one at our path. Two system calls when it is."""
        committed = self.committed_bytes
        size = self._cut_own(data)
        if not self._file.in_place():
            self._start_file(logging.WARNING, "was renamed, removed or replaced")
        elif size > committed and _is_intact(self._file, size, self._state):
            aside = self._file.set_aside(committed)
            self._log.warning("%s: %d bytes of another program were moved to %s", self.path, size - committed, aside)
        elif size != committed:
            note = f"was truncated or changed by another program: {committed} bytes were committed, {size} are there"
            self._start_file(logging.WARNING, note)

    def _cut_own(self, data: bytes) -> int:
        """Cuts what a failed write of `data` left past the committed length; returns the size."""
        end = self.committed_bytes
        size = self._file.size()
        if end < size <= end + len(data) and b"".join(self._file.read(end, size)) == data[: size - end]:
            self._file.cut(end)
            return end
        return size

    def _start_file(self, level: int, note: str) -> None:
        """Goes over to the file that is at our path now, or to a new one. The journal knows it before it gets a row."""
        notes = [note]
        old = self._file
        file = old if old.in_place() else CsvFile(self.path)
        try:
            state = _adopt(file, notes)
            self._journal.commit(state)
        except OSError:
            if file is not old:
                file.close()
            raise
        if file is not old:
            old.close()
        self._file, self._state = file, state
        self._log.log(level, "%s: %s; goes on after %d bytes", self.path, "; ".join(notes), state.committed_bytes)

    def _start_compressing(self) -> None:
        """Compresses rotated files beside the consumer's work, first those that an earlier run left plain."""
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
                    self._log.warning("%s; it stays as it is until the next start", _explain(error, path))

        threading.Thread(target=run, name="gzip", daemon=True).start()


def _load(journal: Journal, notes: list[str]) -> tuple[FileState, bool] | None:
    """The state that the last run left. A journal that cannot be read is moved aside, and is as good as none."""
    try:
        return journal.load()
    except JournalCorrupt as error:
        _set_journal_aside(journal, str(error), notes)
        return None


def _set_journal_aside(journal: Journal, why: str, notes: list[str]) -> None:
    aside = free_name(f"{journal.path}.corrupt-")
    os.rename(journal.path, aside)
    sync_directory(aside)
    notes.append(f"the journal is corrupt ({why}) and was moved to {aside}")


def _recover(file: CsvFile, existed: bool, left: tuple[FileState, bool] | None, notes: list[str]) -> FileState:
    """Brings `file` to its committed length when it is the one that the journal speaks of, and adopts it otherwise."""
    size = file.size()
    if left is None:
        if size or notes:  # something was here before, so the journal is lost, and not only yet to come
            notes.append(
                "without a journal the last rows, if their messages come again, are doubled once, "
                "and retries of older events are not recognised"
            )
        return _adopt(file, notes)
    state, clean = left
    same = (file.device, file.inode) == (state.device, state.inode)
    if not (same or clean):
        _cut_renamed(file.path, state, notes)
    # Every CSV of this kind begins with the header. When no more than that was committed, rows after it are taken for
    # the rest of a crash only in the very file that we wrote; otherwise somebody put a file with rows there.
    known = (
        state.committed_bytes > len(CSV_HEADER)
        or size == state.committed_bytes
        or (file.inode == state.inode and not clean)
    )
    if existed and known and _is_intact(file, size, state):
        if size > state.committed_bytes:
            aside = file.set_aside(state.committed_bytes)
            who = "another program appended after a clean stop" if clean else "the last run had not committed"
            notes.append(f"{size - state.committed_bytes} bytes that {who} were moved to {aside}")
        file.sync()
        sync_directory(file.path)
        return replace(state, device=file.device, inode=file.inode)
    if not existed:
        notes.append("was missing and is started anew")
    elif size < state.committed_bytes:
        notes.append(f"was truncated or replaced: it has {size} bytes, and {state.committed_bytes} were committed")
    else:
        notes.append("was replaced or changed by another program")
    return _adopt(file, notes)


def _is_intact(file: CsvFile, size: int, state: FileState) -> bool:
    """Whether the committed bytes are still there, going by the last of them."""
    return size >= state.committed_bytes and (
        file.crc32(state.chunk_offset, state.committed_bytes) == state.chunk_crc32
    )


def _cut_renamed(path: str, state: FileState, notes: list[str]) -> None:
    """After a crash: finds the file that we wrote under another name (logrotate) and sets its uncommitted end aside."""
    with os.scandir(os.path.dirname(path)) as entries:
        # Not our own: it is open already, and a reboot may have given its disk another device number.
        names = [e.path for e in entries if e.inode() == state.inode and e.is_file() and e.path != path]
    for name in names:
        file = CsvFile(name)
        try:
            size = file.size()
            if file.device == state.device and _is_intact(file, size, state):
                notes.append(f"the file of the last run is now {name}")
                if size > state.committed_bytes:
                    aside = file.set_aside(state.committed_bytes)
                    notes.append(f"{size - state.committed_bytes} bytes that were not committed there moved to {aside}")
                    file.sync()
        finally:
            file.close()


def _adopt(file: CsvFile, notes: list[str]) -> FileState:
    """Takes a file over: its whole rows count as committed, a torn end is set aside, an empty one gets a header.

    Raises OSError for a file that does not begin with our header.
    """
    size = file.size()
    head = b"".join(file.read(0, min(size, len(CSV_HEADER))))
    if head != CSV_HEADER[: len(head)]:
        header = CSV_HEADER.decode().strip()
        raise OSError(errno.EINVAL, f"does not begin with the line {header!r} and CRLF: move it away", file.path)
    if size < len(CSV_HEADER):
        file.cut(0)
        file.write(CSV_HEADER)
        end = len(CSV_HEADER)
    else:
        end = file.rows_end()
        if end < size:
            aside = file.set_aside(end)
            notes.append(f"{size - end} bytes of a torn row at the end were moved to {aside}")
    file.sync()
    sync_directory(file.path)
    offset = max(0, end - CHUNK_BYTES)
    return FileState(file.device, file.inode, end, offset, file.crc32(offset, end), round(time.time(), 3))


def _trouble(error: OSError, path: str, notes: Sequence[str] = ()) -> StartupError:
    kind = DiskTrouble if error.errno in _MAY_END else StartupError
    return kind(_explain(error, path) + (f" ({'; '.join(notes)})" if notes else ""))


def _explain(error: OSError, path: str) -> str:
    """One line for a person: where, what, what to do."""
    advice = {
        errno.EACCES: f"let uid {os.geteuid()} read and write there",
        errno.EPERM: f"let uid {os.geteuid()} read and write there",
        errno.EROFS: "mount it writable, or set CSV_FILE to another place",
        errno.EISDIR: "set CSV_FILE to a file",
        errno.ENOTDIR: "set CSV_FILE to a file in a folder",
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
    }.get(error.errno or 0)
    line = f"{error.filename or path}: {error.strerror or error}"
    return f"{line}; {advice}" if advice else line
