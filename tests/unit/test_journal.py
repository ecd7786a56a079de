"""The journal: a commit is there whole or not at all, and damage is never mistaken for a state."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from common.errors import TakenOver
from common.storage import journal as journal_module
from common.storage.journal import Journal
from common.storage.recovery import Corrupt, FileState, LastRun
from tests.support.least import least

STATE = FileState(device=1, inode=2, committed_bytes=65, chunk_offset=0, chunk_crc32=7, started_at=1.5)
log = logging.getLogger(__name__)


GONE = "its end is gone: its mark knows of a later commit"


def mark_of(path: Path) -> Path:
    return path.with_name("data.csv.committed")


def ids(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def noted_fsyncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the paths of what is synced from now on."""
    synced: list[str] = []
    fsync = os.fsync

    def noted_fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    return synced


def open_journal(path: object, dedup_window: int = 100, prefetch_count: int = 10) -> Journal:
    return Journal(str(path).removesuffix(".journal"), dedup_window, prefetch_count)


def peek(path: Path) -> LastRun | Corrupt | None:
    """Return what a start would find now. The journal itself does not notice."""
    with tempfile.TemporaryDirectory() as folder:
        return open_journal(shutil.copy(path, folder)).load()


@pytest.fixture
def path() -> Iterator[Path]:
    """Return a path in memory: what a step does matters here, not the speed of a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder, "data.csv.journal")


def test_no_journal_is_not_a_state(path: Path) -> None:
    assert open_journal(path).load() is None


def test_the_last_commit_and_all_ids_come_back(path: Path) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1, 2))
    journal.commit(STATE._replace(committed_bytes=99), ids(3))
    journal.close()
    again = open_journal(path)
    assert again.load() == LastRun(STATE._replace(committed_bytes=99), False)
    assert [id for id in ids(0, 1, 2, 3, 4) if again.seen(id)] == ids(1, 2, 3)


def test_only_a_run_that_ended_cleanly_is_clean(path: Path) -> None:
    journal = open_journal(path)
    journal.commit(STATE, clean=True)
    journal.close()
    journal = open_journal(path)
    assert journal.load() == LastRun(STATE, True)
    journal.commit(STATE)
    journal.close()
    assert open_journal(path).load() == LastRun(STATE, False)


def test_a_commit_cut_short_at_any_byte_never_was(path: Path) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    before = path.stat().st_size
    mark = mark_of(path).read_bytes()
    journal.commit(STATE._replace(committed_bytes=99), ids(2))
    journal.close()
    mark_of(path).write_bytes(mark)  # it is written after the commit
    whole = path.read_bytes()
    for length in range(before, len(whole) - 1):  # a whole line without its line end may count or not
        for rest in (b"", b"\0" * (len(whole) - length), b"\n" * (len(whole) - length)):
            if (torn := whole[:length] + rest) == whole:
                continue
            path.write_bytes(torn)
            again = open_journal(path)
            assert again.load() == LastRun(STATE, False)
            assert again.seen(*ids(1))
            assert not again.seen(*ids(2))


def test_a_commit_cut_short_after_it_was_done_is_noticed(path: Path) -> None:
    """It is cut at any byte. The mark knows of it."""
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    before = path.stat().st_size
    journal.commit(STATE._replace(committed_bytes=99), ids(2))
    journal.close()
    whole = path.read_bytes()
    for length in range(before, len(whole) - 1):
        path.write_bytes(whole[:length])
        again = open_journal(path)
        assert again.load() == LastRun(STATE, False, GONE)
        assert again.seen(*ids(1))


def test_a_mark_that_was_removed_is_written_again(path: Path) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    mark_of(path).unlink()
    journal.commit(STATE._replace(committed_bytes=99), ids(2))
    assert json.loads(mark_of(path).read_text())["committed_bytes"] == 99


def test_a_journal_replaced_while_it_is_read_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence of the new run is in the old file, and a run without a working lock goes on in another."""
    open_journal(path).commit(STATE, ids(1))
    read_lines = journal_module.read_lines

    def replaced(*arguments: Any) -> bool:
        monkeypatch.setattr(journal_module, "read_lines", read_lines)
        os.replace(shutil.copy(path, path.with_name("copy")), path)
        return read_lines(*arguments)

    monkeypatch.setattr(journal_module, "read_lines", replaced)
    with pytest.raises(OSError, match="was changed while it was read"):
        open_journal(path).load()
    assert open_journal(path).load() == LastRun(STATE, False, "")


@pytest.mark.parametrize("mark", [b"", b"\0" * 110, b"0000000a {}", b"not a mark\n"])
def test_a_mark_that_cannot_be_read_is_as_good_as_none(path: Path, mark: bytes) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    journal.close()
    mark_of(path).write_bytes(mark)
    assert open_journal(path).load() == LastRun(STATE, False)


def test_the_mark_is_cleared_before_the_journal_goes_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(path)
    journal.commit(STATE._replace(committed_bytes=99), ids(1))
    synced = noted_fsyncs(monkeypatch)
    journal.commit(STATE, ids(2))
    assert synced == [str(mark_of(path)), str(path)]
    journal.close()


@pytest.mark.parametrize("step", ["ftruncate", "fsync"])
def test_a_mark_that_was_not_cleared_is_by_the_next_attempt(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It is also synced."""
    journal = open_journal(path)
    journal.commit(STATE._replace(committed_bytes=99), ids(1))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output error"):
            journal.commit(STATE, ids(2))
    synced = noted_fsyncs(monkeypatch)
    journal.commit(STATE, ids(2))
    assert synced == [str(mark_of(path)), str(path)]
    journal.close()


def test_damage_before_the_last_commit_is_corruption(path: Path) -> None:
    """The damage is at any byte."""
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    before = path.stat().st_size
    journal.commit(STATE, ids(2))
    journal.close()
    whole = path.read_bytes()
    for at in range(before):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert isinstance(open_journal(path).load(), Corrupt)


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 4096, b"SQLite format 3\0", os.urandom(1000), b"{}\n"])
def test_a_file_that_is_not_a_journal_is_corruption(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert isinstance(open_journal(path).load(), Corrupt)


@pytest.mark.parametrize("text", [b"[]", b"{}", b"null", b"nonsense", b'{"ids": "00", "clean": true, "file": {}}'])
def test_a_whole_line_that_says_something_else_is_corruption(path: Path, text: bytes) -> None:
    path.write_bytes(b"%08x %b\n" % (zlib.crc32(text), text))
    assert isinstance(open_journal(path).load(), Corrupt)


def test_exactly_the_window_is_remembered(path: Path) -> None:
    """That holds in memory, and after a restart."""
    journal = open_journal(path, dedup_window=30)
    for number in range(0, 1000, 7):
        journal.commit(STATE, ids(*range(number, number + 7)))
        last = number + 6
        assert [n for n in range(1100) if journal.seen(*ids(n))] == list(range(max(0, last - 29), last + 1))
    journal.close()
    again = open_journal(path, dedup_window=30)
    again.load()
    assert [n for n in range(1100) if again.seen(*ids(n))] == list(range(last - 29, last + 1))


def test_the_window_covers_what_the_broker_can_redeliver(path: Path) -> None:
    journal = open_journal(path, dedup_window=0, prefetch_count=50)
    assert journal.window == 100
    journal.commit(STATE, ids(*range(100)))
    journal.close()
    for _ in range(2):  # what was unacked under the large prefetch_count can come back in any later run
        journal = open_journal(path, dedup_window=0, prefetch_count=1)
        journal.load()
        assert journal.window == 100
        assert journal.seen(*ids(0))
        journal.commit(STATE)
        journal.close()


def test_the_file_stays_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It forgets nothing within the window."""
    monkeypatch.setattr(journal_module, "_LEAST_ROOM_BYTES", 20_000 - 64 * 100)
    journal = open_journal(path, dedup_window=100)
    largest = 0
    for number in range(300):
        journal.commit(STATE, ids(number))
        largest = max(largest, path.stat().st_size)
    journal.close()
    assert largest < 21_000
    again = open_journal(path, dedup_window=100)
    again.load()
    assert all(again.seen(id) for id in ids(*range(200, 300)))


@pytest.mark.parametrize(
    ("when", "step"),
    [
        ("appending", "write"),
        ("appending", "fsync"),
        ("replacing", "write"),
        ("replacing", "fsync"),
        ("replacing", "rename"),
    ],
)
def test_after_a_failed_step_the_same_commit_again_settles_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, when: str, step: str
) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    if when == "replacing":
        journal.close()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    new = STATE._replace(committed_bytes=99)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="Input/output error"):
                journal.commit(new, ids(2))
        assert not journal.seen(*ids(2))
        assert peek(path) in [LastRun(STATE, False), LastRun(new, False)]
    journal.commit(new, ids(2))
    journal.close()
    again = open_journal(path)
    assert again.load() == LastRun(new, False)
    assert [n for n in range(4) if again.seen(*ids(n))] == [1, 2]
    assert sorted(os.listdir(path.parent)) == [mark_of(path).name, path.name]


def test_a_file_that_failed_is_not_written_to_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(path)
    journal.commit(STATE)
    inode = path.stat().st_ino
    kept = os.open(path, os.O_RDONLY)  # keeps the inode number from being used again
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "EIO")))
        with pytest.raises(OSError, match="EIO"):
            journal.commit(STATE)
    journal.commit(STATE)
    assert path.stat().st_ino != inode
    os.close(kept)


@pytest.mark.parametrize("harm", ["removed", "replaced", "truncated", "appended to"])
def test_a_journal_that_was_touched_is_written_again(path: Path, harm: str) -> None:
    """It is written whole, from memory."""
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    if harm == "removed":
        path.unlink()
    elif harm == "replaced":
        path.rename(path.with_name("elsewhere"))
        path.write_bytes(b"garbage")
    elif harm == "truncated":
        os.truncate(path, 10)
    else:
        with path.open("ab") as file:
            file.write(b"garbage\n")
    journal.commit(STATE, ids(2))
    journal.commit(STATE, ids(3))
    journal.close()
    again = open_journal(path)
    assert again.load() == LastRun(STATE, False)
    assert [n for n in range(5) if again.seen(*ids(n))] == [1, 2, 3]


def test_a_commit_is_one_write_and_one_fsync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(path)
    journal.commit(STATE)
    write, fsync = Mock(side_effect=os.write), Mock(side_effect=os.fsync)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)
    journal.commit(STATE, ids(*range(1000)))
    assert (write.call_count, fsync.call_count) == (1, 1)


def test_200_000_ids_load_in_well_under_a_second(path: Path) -> None:
    journal = open_journal(path, dedup_window=200_000)
    for number in range(0, 200_000, 1000):
        journal.commit(STATE, ids(*range(number, number + 1000)))
    journal.close()

    def seconds() -> float:
        again = open_journal(path, dedup_window=200_000)
        began = time.process_time()
        again.load()
        taken = time.process_time() - began
        assert len(again) == 200_000
        again.close()
        return taken

    assert least(seconds, 0.5) < 0.5


def test_how_long_ids_stay_in_the_window_is_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    journal = open_journal(path, dedup_window=800)
    for number in range(400):
        if number < 100:
            assert journal.window_seconds is None
        journal.commit(STATE, ids(*range(number * 8, number * 8 + 8)))
        now += 0.1
    assert journal.window_seconds == pytest.approx(10, rel=1 / 8)
    for number in range(400, 530):
        journal.commit(STATE, ids(*range(number * 8, number * 8 + 8)))
        now += 0.01
    assert journal.window_seconds == pytest.approx(1, rel=1 / 4)


@pytest.mark.parametrize("lines", range(1, 7))
def test_a_rewritten_journal_without_its_last_line_is_corrupt(
    path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    monkeypatch.setattr(journal_module, "_LINE_IDS", 20)
    journal = open_journal(path)
    journal.commit(STATE, ids(*range(100)))
    journal.close()
    journal = open_journal(path)
    assert journal.load() == LastRun(STATE, False)
    journal.commit(STATE)
    journal.close()
    whole = path.read_bytes().splitlines(keepends=True)
    assert len(whole) == 7
    path.write_bytes(b"".join(whole[:lines]))
    assert isinstance(open_journal(path).load(), Corrupt)


# Generations


def test_a_run_that_was_overtaken_commits_nothing_more(path: Path) -> None:
    """It commits neither a line nor a new file. The next run finds what it committed before."""
    first = open_journal(path)
    first.commit(STATE, ids(1))
    second = open_journal(path)
    assert second.load() == LastRun(STATE, False)
    new = STATE._replace(committed_bytes=99)
    with pytest.raises(TakenOver, match="another consumer has begun to write the same CSV"):
        first.commit(new, ids(2))
    second.commit(STATE, ids(3))
    with pytest.raises(TakenOver):
        first.commit(new, ids(2))
    with pytest.raises(TakenOver):
        first.check()
    first.close()
    second.commit(STATE._replace(committed_bytes=77), ids(4))
    second.close()
    third = open_journal(path)
    assert third.load() == LastRun(STATE._replace(committed_bytes=77), False)
    assert [n for n in range(6) if third.seen(*ids(n))] == [1, 3, 4]
    assert sorted(os.listdir(path.parent)) == [mark_of(path).name, path.name]


def test_a_commit_after_the_fence_does_not_count(path: Path) -> None:
    """Its run got TakenOver, and the next run can end before its own first commit."""
    first = open_journal(path)
    first.commit(STATE, ids(1))
    open_journal(path).load()
    with pytest.raises(TakenOver):
        first.commit(STATE._replace(committed_bytes=99), ids(2))
    third = open_journal(path)
    assert third.load() == LastRun(STATE, False)
    assert not third.seen(*ids(2))


def test_a_commit_just_before_the_fence_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that fences may have read the file before that commit, so it reads again."""
    first = open_journal(path)
    first.commit(STATE, ids(1))
    new = STATE._replace(committed_bytes=99)
    fence = Journal._fence

    def late(journal: Journal, *arguments: Any) -> None:
        first.commit(new, ids(2))
        fence(journal, *arguments)

    monkeypatch.setattr(Journal, "_fence", late)
    second = open_journal(path)
    assert second.load() == LastRun(new, False)
    assert second.seen(*ids(2))


def test_of_two_runs_that_begin_at_once_one_commits(path: Path) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    journal.close()
    first, second = open_journal(path), open_journal(path)
    assert first.load() == second.load() == LastRun(STATE, False)
    with pytest.raises(TakenOver):
        first.commit(STATE, ids(2))
    second.commit(STATE, ids(3))


def test_a_fence_follows_a_torn_commit(path: Path) -> None:
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    journal.close()
    with path.open("ab") as file:
        file.write(b"0123abcd {torn")
    for _ in range(3):  # starts that fail before their first commit
        assert open_journal(path).load() == LastRun(STATE, False)


def test_an_older_journal_is_known_by_its_mark_across_files(path: Path) -> None:
    """That holds also if the CSV was rotated meanwhile, so that the mark is of another file."""
    journal = open_journal(path)
    journal.commit(STATE, ids(1))
    journal.close()
    old = path.read_bytes()
    journal = open_journal(path)
    journal.load()
    journal.commit(STATE._replace(inode=3), ids(2))
    journal.close()
    path.write_bytes(old)
    assert open_journal(path).load() == LastRun(STATE, False, GONE)


def test_a_clock_set_back_gives_no_older_generation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_journal(path)
    first.commit(STATE)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: 1)
        second = open_journal(path)
        second.load()
        second.commit(STATE)
    with pytest.raises(TakenOver):
        first.commit(STATE)
