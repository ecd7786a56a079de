"""Exactly once through a crash at every single step of the store.

A consumer's life (recovery, batches, a rotation, a logrotate, a clean stop) is cut off before each call that changes
the disk: by SIGKILL in a process of its own, and by a model of a power cut, where everything that was not synced is
kept, lost, torn or out of order. Then the broker delivers again what was not acked, a client retries everything, and
the rows are counted. The last tests take a safety away and show that the count then finds the fault.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import random
import signal
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from common.errors import StartupError
from common.event.rows import CSV_HEADER
from common.storage import journal, repair, store
from common.storage.csv_file import CsvFile
from common.storage.journal import Journal
from common.storage.reader import MarkFile, read_mark
from common.storage.recovery import FileState
from common.storage.repair import adopt
from common.storage.store import Store

MESSAGES = range(20)
BATCH = 3
CHANGES = ("open", "write", "pwrite", "fsync", "ftruncate", "rename", "unlink")  # the os functions that change the disk
log = logging.getLogger(__name__)
log.setLevel(logging.ERROR)


def rows(message: int) -> list[list[str]]:
    return [[f"device {message}", str(row), 'a "quoted"\r\ncell', "", "", "0.5", "cat"] for row in range(message % 4)]


def encode(message: int) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=";").writerows(rows(message))
    return text.getvalue().encode()


def message_id(message: int) -> bytes:
    return message.to_bytes(16, "big")


def live(folder: Path, deliveries: list[int], ack: Callable[[int], object]) -> None:
    """One life of a consumer. Half-way it rotates, and logrotate renames its file."""
    path = str(folder / "data.csv")
    consumer = Store.open(path, 100, BATCH, log)
    for start in range(0, len(deliveries), BATCH):
        batch = deliveries[start : start + BATCH]
        fresh = [message for message in batch if not consumer.seen(message_id(message))]
        consumer.append(b"".join(map(encode, fresh)), list(map(message_id, fresh)))
        for message in batch:
            ack(message)
        if start == BATCH:
            consumer.rotate()
        if start == 3 * BATCH:
            os.rename(path, folder / f"renamed-{len(os.listdir(folder))}")
            consumer.reopen()
    consumer.close()


def check(folder: Path) -> None:
    """Check that every row of every message is in the files of `folder` exactly once, and nothing else is."""
    found: Counter[tuple[str, ...]] = Counter()
    for path in folder.iterdir():
        if any(part in path.name for part in (".uncommitted-", ".journal", ".committed")):
            continue
        content = path.read_bytes()
        assert content.startswith(CSV_HEADER) or CSV_HEADER.startswith(content), f"no header in {path.name}"
        found.update(
            map(tuple, csv.reader(io.StringIO(content[len(CSV_HEADER) :].decode(), newline=""), delimiter=";"))
        )
    expected = Counter(tuple(row) for message in MESSAGES for row in rows(message))
    assert not expected - found, f"lost: {expected - found}"
    assert not found - expected, f"duplicated or torn: {found - expected}"


def skip(*_: Any) -> None:
    pass


@pytest.fixture
def folders() -> Iterator[Iterator[Path]]:
    """Yield new folders without end, in memory: the order of the steps matters here, not the speed of a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:

        def new() -> Iterator[Path]:
            for number in count():
                (folder := Path(root, str(number))).mkdir()
                yield folder

        yield new()


def die_before(step: int, torn: bool) -> None:
    """Send SIGKILL to this process in place of the `step`-th change of the disk, or when half of a write is done."""

    def wrap(name: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def call(*args: Any) -> Any:
            nonlocal step
            step -= 1
            if step == 0:
                if torn:
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, name, call)

    for name in ("write",) if torn else CHANGES:
        wrap(name)


def live_and_die(folder: Path, deliveries: list[int], step: int, torn: bool) -> tuple[list[int], bool]:
    """Live in a process of its own, killed before `step`. Return what it acked, and whether it was killed."""
    acks, report = os.pipe()
    write = os.write
    if (pid := os.fork()) == 0:
        try:
            die_before(step, torn)
            live(folder, deliveries, lambda message: write(report, bytes([message])))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(report)
    with open(acks, "rb") as file:
        acked = list(file.read())
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return acked, status != 0


@pytest.mark.parametrize("torn", [False, True], ids=["between steps", "within a write"])
def test_killed_at_any_step_every_row_is_there_once(folders: Iterator[Path], torn: bool) -> None:
    """It is also killed again in its recovery."""
    chance = random.Random(torn)
    for step, folder in enumerate(folders, 1):
        unacked = list(MESSAGES)
        acked, killed = live_and_die(folder, unacked, step, torn)
        if not killed:
            break
        unacked = unacked[len(acked) :]
        acked, _ = live_and_die(folder, unacked, chance.randint(1, 4 if torn else 12), torn)
        unacked = unacked[len(acked) :]
        live(folder, unacked, skip)
        live(folder, list(MESSAGES), skip)
        check(folder)
    assert step > (20 if torn else 60)


# A power cut


@dataclass
class File:
    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # offset and data; None: cut to that length

    def after_a_power_cut(self, survives: Callable[[], bool], chance: random.Random) -> bytes:
        content = self.synced
        for offset, data in self.pending:
            if not survives():
                continue
            if data is None:
                content = content[:offset]
                continue
            if not survives():
                data = data[: chance.randrange(len(data))]
            content = content.ljust(offset, b"\0")  # a hole, where an earlier write did not survive
            content = content[:offset] + data + content[offset + len(data) :]
        return content


@dataclass
class Disk:
    """What a power cut can leave of one folder, by what POSIX promises: the rest of a file after its fsync, names after
    the fsync of their folder; names change in order."""

    files: dict[int, File] = field(default_factory=dict)  # by inode
    names: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, str, int]] = field(default_factory=list)  # old name or "", new name or "", inode
    acked: list[int] = field(default_factory=list)

    def after_a_power_cut(self, survives: Callable[[], bool], chance: random.Random, folder: Path) -> None:
        """Lay the surviving files out in `folder`."""
        names = dict(self.names)
        for old, new, inode in self.pending:
            if not survives():
                break
            names.pop(old, None)
            if new:
                names[new] = inode
        inodes = {}
        for name, inode in names.items():
            (folder / name).write_bytes(self.files[inode].after_a_power_cut(survives, chance))
            inodes[inode] = (folder / name).stat().st_ino
        for path in folder.glob("*.journal*"):
            path.write_bytes(b"\n".join(renumbered(line, inodes) for line in path.read_bytes().split(b"\n")))
        mark = read_mark(str(folder / "data.csv"))
        MarkFile(str(folder / "data.csv")).write(mark._replace(inode=inodes.get(mark.inode, 0)))


def renumbered(line: bytes, inodes: dict[int, int]) -> bytes:
    """Return the journal line with the inode number that its file has in the new folder."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return line
    record = json.loads(text)
    if "file" not in record:
        return line
    record["file"]["inode"] = inodes.get(record["file"]["inode"], 0)
    text = json.dumps(record).encode()
    return b"%08x %b" % (zlib.crc32(text), text)


def trace(folder: Path, patch: pytest.MonkeyPatch) -> list[Disk]:
    """Return the disk before each step of a life."""
    disk = Disk()
    moments = [deepcopy(disk)]
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CHANGES}

    def record(name: str, change: Callable[..., Any]) -> None:
        def call(*args: Any) -> Any:
            result = change(*args)
            moments.append(deepcopy(disk))
            return result

        patch.setattr(os, name, call)

    def inode(fd: int) -> int:
        return os.fstat(fd).st_ino

    def open_(path: Any, flags: int, mode: int = 0o777) -> int:
        new = flags & os.O_CREAT and not os.path.exists(path)
        fd: int = real["open"](path, flags, mode)
        if new:
            disk.files[inode(fd)] = File()
            disk.pending.append(("", os.path.basename(path), inode(fd)))
        elif flags & os.O_TRUNC:
            disk.files[inode(fd)].pending.append((0, None))
        return fd

    def write(fd: int, data: Any) -> int:
        disk.files[inode(fd)].pending.append((os.fstat(fd).st_size, bytes(data)))
        written: int = real["write"](fd, data)
        assert written == len(data)
        return written

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        disk.files[inode(fd)].pending.append((offset, data))
        return int(real["pwrite"](fd, data, offset))

    def fsync(fd: int) -> None:
        real["fsync"](fd)
        if inode(fd) in disk.files:
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                disk.files[inode(fd)] = File(file.read())
        else:
            for old, new, number in disk.pending:
                disk.names.pop(old, None)
                if new:
                    disk.names[new] = number
            disk.pending.clear()

    def ftruncate(fd: int, length: int) -> None:
        real["ftruncate"](fd, length)
        disk.files[inode(fd)].pending.append((length, None))

    def rename(old: Any, new: Any) -> None:
        disk.pending.append((os.path.basename(old), os.path.basename(new), os.stat(old).st_ino))
        real["rename"](old, new)

    def unlink(path: Any) -> None:
        disk.pending.append((os.path.basename(path), "", 0))
        real["unlink"](path)

    model: list[Callable[..., Any]] = [open_, write, pwrite, fsync, ftruncate, rename, unlink]
    for name, change in zip(CHANGES, model, strict=True):
        record(name, change)
    live(folder, list(MESSAGES), disk.acked.append)
    moments.append(disk)
    patch.undo()
    return moments


def cut_power_everywhere(folders: Iterator[Path], tries: int) -> int:
    """Recover from a power cut before each step, `tries` times; logrotate can come before the recovery.

    Return how many cuts there were.
    """
    cuts = 0
    for moment in trace(next(folders), pytest.MonkeyPatch()):
        for way in range(tries):
            chance = random.Random(cuts)
            odds = chance.choice([0.0, 1.0, 0.6])
            survives = partial(lambda odds, chance: chance.random() < odds, odds, chance)
            folder = next(folders)
            moment.after_a_power_cut(survives, chance, folder)
            if way % 2 and (folder / "data.csv").exists():
                (folder / "data.csv").rename(folder / "renamed-meanwhile")
            live(folder, list(MESSAGES[len(moment.acked) :]), skip)
            live(folder, list(MESSAGES), skip)
            check(folder)
            cuts += 1
    return cuts


def test_after_a_power_cut_at_any_step_every_row_is_there_once(folders: Iterator[Path]) -> None:
    assert cut_power_everywhere(folders, tries=6) > 300


def without_ids(commit: Callable[..., None]) -> Callable[..., None]:
    return lambda self, state, ids=(), clean=False: commit(self, state, (), clean)


def commit_before_write(self: Store, data: bytes, ids: list[bytes]) -> None:
    state = self._state._replace(committed_bytes=self.committed_bytes + len(data))
    self._journal.commit(state, ids)
    self._file.write(data)
    self._file.sync()
    self._state = state


def adopt_always(plan: object, file: CsvFile, journal: Journal, notes: list[str]) -> FileState:
    return adopt(file, notes)


@pytest.mark.parametrize(
    ("place", "name", "harm", "fault"),
    [
        (CsvFile, "sync", skip, "lost|torn|no header|not begin"),
        (repair, "sync_directory", skip, "lost"),
        (journal, "sync_directory", skip, "lost|duplicated"),
        (store, "apply", adopt_always, "duplicated"),
        (repair, "cut_renamed", skip, "duplicated"),
        (Store, "append", commit_before_write, "lost"),
        (Store, "seen", skip, "duplicated"),
        (Journal, "commit", without_ids(Journal.commit), "duplicated"),
    ],
    ids=[
        "no fsync",
        "a new CSV's name not synced",
        "the journal's name not synced",
        "uncommitted bytes not cut",
        "uncommitted bytes not cut in a renamed file",
        "commit before write",
        "duplicates not dropped",
        "ids not remembered",
    ],
)
def test_the_count_finds_the_fault_when_a_safety_is_taken_away(
    folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch, place: Any, name: str, harm: Any, fault: str
) -> None:
    monkeypatch.setattr(place, name, harm)
    with pytest.raises((AssertionError, StartupError), match=fault):
        cut_power_everywhere(folders, tries=4)
