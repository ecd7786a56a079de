"""The journal next to the CSV: which bytes of which file are committed, and the ids of recent messages.

An append-only text file. Each line is a checksum and one JSON record, and is one commit: one write, one fsync. A line
cut short by a crash is a commit that never happened. The first line holds the version of the format and every id, each
other line the ids of its commit. The file is replaced as a whole (new file, sync, rename) when it has grown, and after
any failure, because a failed write or fsync leaves it unknown what is on disk.

A second file, the mark, says how far the journal went. It is written after each commit and not synced. It distinguishes
a journal whose end is gone (truncated, or an old copy put back) from one whose last commit never happened.

Locks decide who may write. Where they have no effect (some network file systems), the journal itself keeps a second
writer out. Each run has a generation, greater than any before. It begins with a fence, a line after which commits of
earlier generations do not count, written before the last state is read. Each commit ends with a check of the file. If
it is not as this run left it, a later generation may have begun, and nothing of this commit is acked. So the next run
sees a commit before the fence, and this run notices one after it.

Knows nothing of the CSV itself. For one thread.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain, islice
from struct import iter_unpack
from typing import Any, NamedTuple

from common.errors import StartupError, TakenOver
from common.storage.files import checked, free_name, naming, sync_directory, with_checksum, write_all
from common.storage.state import FileState, LastRun

ID_BYTES = 16
_to_json = json.JSONEncoder(separators=(",", ":")).encode
VERSION = 2  # of the format; version 1 is that of predlog 1.0.0, whose lines have no version


class JournalCorrupt(Exception):
    """A journal that exists, and does not say what was committed."""


class Mark(NamedTuple):
    inode: int
    committed_bytes: int
    generation: int


class _Content(NamedTuple):
    state: FileState
    clean: bool
    prefetch_count: int
    ids: list[bytes]
    generation: int


class Journal:
    def __init__(self, path: str, dedup_window: int, prefetch_count: int, log: logging.Logger) -> None:
        self.path = path
        self._log = log
        self._dedup_window = dedup_window
        self._prefetch_count = prefetch_count
        self._order: deque[bytes] = deque()  # the same ids in commit order
        self._ids: set[bytes] = set()
        self._generation = time.time_ns()  # of this run: unique, and `load` makes it greater than any before
        self._last_generation = 0  # of the journal on the disk
        self._place: tuple[int, int, int] | None = None  # device, inode and size of the journal as this run left it
        self._fd = -1  # -1: the next commit writes a new file
        self._failed = False  # whether the last write did, so that what it left is unknown
        self._mark: Mark | None = None  # the furthest that the mark on disk may say
        self._mark_fd = -1

    def at(self, path: str) -> Journal:
        """Return a journal like this one for another file."""
        return Journal(path, self._dedup_window, self._prefetch_count, self._log)

    @property
    def window(self) -> int:
        """The number of ids that are kept.

        The broker can redeliver the events of `prefetch_count` messages, and as many others can be committed meanwhile.
        The largest number ever known counts, because what was unacked then may still be redelivered.
        """
        return max(self._dedup_window, 2 * self._prefetch_count)

    def expect_again(self, events: int) -> None:
        """Raise the number of events that can be delivered again. The next commit makes it durable."""
        self._prefetch_count = max(self._prefetch_count, events)

    def load(self) -> LastRun | None:
        """Begin a run: remember the ids of the last one, and return what else it left; None without a journal.

        Raise OSError, JournalCorrupt for anything that a crash of ours cannot have left, and StartupError for a journal
        of a newer version. These two leave the file as it is.
        """
        self._mark = _read_mark(self._mark_path)
        newest = self._mark.generation if self._mark is not None else 0
        self._generation = max(self._generation, newest + 1)
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:
            return None
        try:
            with naming(self.path):
                whole = _read(fd)
                content = self._parse(whole)
                self._generation = max(self._generation, content.generation + 1)
                if (before := self._fence(fd)) != whole:  # committed meanwhile
                    content = self._parse(before)
        finally:
            os.close(fd)
        self._last_generation = content.generation
        self._prefetch_count = max(self._prefetch_count, content.prefetch_count)
        self._remember(content.ids[-self.window :])
        state, outdated = content.state, ""
        if newest > content.generation:
            outdated = "its end is gone: it is older than its mark"
        elif (
            self._mark is not None
            and self._mark.inode == state.inode
            and self._mark.committed_bytes > state.committed_bytes
        ):
            outdated = f"its end is gone: it knows of {state.committed_bytes} bytes, not {self._mark.committed_bytes}"
        return LastRun(state, content.clean, outdated)

    def remember(self, ids: Iterable[bytes]) -> None:
        """Take over ids of another journal, before the first commit."""
        self._remember([id for id in ids if id not in self._ids])

    def seen(self, id: bytes) -> bool:
        return id in self._ids

    def __len__(self) -> int:
        return len(self._order)

    def ids(self) -> Iterator[bytes]:
        """Return the ids in the order of their commits, oldest first."""
        return iter(self._order)

    def commit(self, state: FileState, ids: Sequence[bytes] = (), clean: bool = False) -> None:
        """Make `state` and new `ids` (16 bytes each) durable, then remember them.

        Raise OSError if the commit may or may not be on disk; repeat the same call until it succeeds. Raise TakenOver
        when another run has begun; this one must then touch nothing and ack nothing.
        """
        mark = self._mark
        if mark is not None and not (mark.inode == state.inode and mark.committed_bytes <= state.committed_bytes):
            # The mark must never be ahead of the journal, not even after a power cut.
            self._write_mark(Mark(state.inode, state.committed_bytes, self._last_generation), sync=True)
        done = False
        if self._fd >= 0 and self._place is not None and self._place[2] < self._limit_bytes():
            self._append(self._line(state, ids, clean))
            done = self._is_untouched()
        if not done:
            known = islice(self._order, max(0, len(self._order) + len(ids) - self.window), None)
            self._replace(self._line(state, chain(known, ids), clean, first=True))
        self._remember(ids)
        self._last_generation = self._generation
        with suppress(OSError):  # an older mark does no harm
            self._write_mark(Mark(state.inode, state.committed_bytes, self._generation), sync=False)

    def set_aside(self) -> str:
        """Rename the journal on disk, which is corrupt or outdated; return its new name."""
        aside = free_name(f"{self.path}.corrupt-")
        os.rename(self.path, aside)
        sync_directory(aside)
        self._place = None
        return aside

    def check(self) -> None:
        """Raise TakenOver when another run has begun, OSError when that cannot be known."""
        self._is_untouched()

    def close(self) -> None:
        self._close_file()
        self._close_mark()

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _close_mark(self) -> None:
        if self._mark_fd >= 0:
            os.close(self._mark_fd)
            self._mark_fd = -1

    @property
    def _mark_path(self) -> str:
        return f"{self.path}.mark"

    def _write_mark(self, mark: Mark, sync: bool) -> None:
        if not sync:
            self._mark = mark  # a failed write may have reached the disk
        if self._mark_fd < 0:
            self._mark_fd = os.open(self._mark_path, os.O_RDWR | os.O_CREAT, 0o644)
        text = b'{"file": {"inode": %d, "committed_bytes": %d}, "generation": %d}' % mark
        with naming(self._mark_path):
            os.pwrite(self._mark_fd, with_checksum(text.ljust(140)), 0)
            if sync:
                os.fsync(self._mark_fd)
        self._mark = mark

    def _remember(self, ids: Sequence[bytes]) -> None:
        self._order.extend(ids)
        self._ids.update(ids)
        for _ in range(len(self._order) - self.window):
            self._ids.discard(self._order.popleft())

    def _line(self, state: FileState, ids: Iterable[bytes], clean: bool, first: bool = False) -> bytes:
        record: dict[str, Any] = {"version": VERSION, "generation": self._generation} if first else {}
        record |= {
            "file": asdict(state),
            "clean": clean,
            "prefetch_count": self._prefetch_count,
            "at": int(time.time() * 1000) / 1000,  # never ahead of the clock
            "ids": b"".join(ids).hex(),
        }
        return with_checksum(_to_json(record).encode())

    def _limit_bytes(self) -> int:
        return (4 << 20) + 2 * (2 * ID_BYTES * self.window)

    def _fence(self, fd: int) -> bytes:
        """Write the fence of this run; return the journal before it."""
        line = b"\n" + with_checksum(b'{"fence":%d}' % self._generation)  # a torn commit may come before it
        write_all(fd, line)
        os.fsync(fd)
        whole = _read(fd)
        if (at := whole.find(line)) < 0:
            raise OSError(errno.EBUSY, "was changed while it was read")
        status = os.fstat(fd)
        self._place = status.st_dev, status.st_ino, at + len(line)
        return whole[:at]

    def _is_untouched(self) -> bool:
        """Tell whether the journal is as this run left it. Raise TakenOver when another run has begun."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            place = None
        else:
            place = status.st_dev, status.st_ino, status.st_size
        if place == self._place:
            return True
        if place is not None and self._newest_generation() > self._generation:
            raise TakenOver(
                f"{self.path}: another consumer has begun to write the same CSV, although this one has its lock (the "
                "lock file was removed, or flock has no effect on this file system): this one stops, and acks nothing"
            )
        return False

    def _newest_generation(self) -> int:
        newest = 0
        with open(self.path, "rb") as file:
            for line in file:
                text = checked(line.removesuffix(b"\n"))
                with suppress(ValueError, TypeError):
                    record = json.loads(text or b"{}")
                    newest = max(newest, int(record.get("generation", 0)), int(record.get("fence", 0)))
        return newest

    def _parse(self, whole: bytes) -> _Content:
        """Parse a journal. Raise JournalCorrupt, and StartupError for a newer version."""
        content: _Content | None = None
        ids: list[str] = []
        generation, damaged, fenced = 0, False, False
        for line in whole.split(b"\n")[:-1]:
            text = checked(line)
            if text is None:
                damaged = True  # a torn commit if nothing but a fence follows
                continue
            try:
                record = json.loads(text)
                if "fence" in record:
                    generation, damaged, fenced = int(record["fence"]), False, True
                    continue
                if int(record.get("version", 1)) > VERSION:
                    raise StartupError(
                        f"{self.path}: its format {record['version']} is that of a newer predlog, and this one reads "
                        f"up to {VERSION}: upgrade, or move the journal and its CSV away together"
                    )
                if fenced:
                    continue  # a commit behind the fence
                ids.append(record["ids"])
                generation = int(record.get("generation", generation))
                content = _content(record, generation)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise JournalCorrupt(f"not a journal of this version ({error!r})") from error
            if damaged:
                raise JournalCorrupt("a damaged line")
        if content is None:
            raise JournalCorrupt("no whole line")
        try:
            packed = bytes.fromhex("".join(ids))
            if len(packed) % ID_BYTES:
                raise ValueError("impossible numbers")
        except (ValueError, TypeError) as error:
            raise JournalCorrupt(f"not a journal of this version ({error!r})") from error
        return content._replace(ids=[id for (id,) in iter_unpack("16s", packed)], generation=generation)

    def _append(self, line: bytes) -> None:
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

    def _replace(self, line: bytes) -> None:
        self._close_file()
        self._close_mark()  # its folder may be a new one
        new = f"{self.path}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            with naming(self.path):
                write_all(fd, line)
                os.fsync(fd)
                if not self._is_untouched() and not self._failed:
                    self._log.warning(
                        "%s: another program changed or removed it; it is written again, whole", self.path
                    )
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
        self._place = status.st_dev, status.st_ino, len(line)


def _content(record: dict[str, Any], generation: int) -> _Content:
    """Return the content of a commit without its ids. Raise ValueError, TypeError or KeyError."""
    state = FileState(**record["file"])
    if not 0 <= state.chunk_offset <= state.committed_bytes:
        raise ValueError("impossible numbers")
    set_back_seconds = float(record.get("at", 0.0)) - time.time()
    if set_back_seconds > 0:  # the clock was set back: keep the age of the file
        state = replace(state, started_at=state.started_at - set_back_seconds)
    return _Content(state, bool(record["clean"]), int(record["prefetch_count"]), [], generation)


def _read_mark(path: str) -> Mark | None:
    """Return the mark; None if it is missing or torn."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as file:
        text = checked(file.readline().removesuffix(b"\n"))
        if text is not None:
            record = json.loads(text)
            file_record = record["file"]
            generation = int(record.get("generation", 0))
            return Mark(int(file_record["inode"]), int(file_record["committed_bytes"]), generation)
    return None


def _read(fd: int) -> bytes:
    blocks, at = [], 0
    while block := os.pread(fd, 1 << 24, at):
        blocks.append(block)
        at += len(block)
    return b"".join(blocks)
