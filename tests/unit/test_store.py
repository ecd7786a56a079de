"""The store: each state that a crash, a person or another program can leave is recognised, explained and survived."""

from __future__ import annotations

import csv
import errno
import fcntl
import gzip
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import DiskTrouble, StartupError, TakenOver
from common.event.rows import CSV_HEADER
from common.storage.csv_file import CsvFile
from common.storage.journal import Journal
from common.storage.lock import Lock
from common.storage.store import Store
from tests.support.polling import wait_until
from tests.unit.test_store_crash import die_before

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
log = logging.getLogger(__name__)
log.setLevel(logging.INFO)


def row(number: int) -> bytes:
    return b'device %d;"two\r\nlines";2024;license;frame.jpg;0.5;"a,""b"""\r\n' % number


def records(content: bytes) -> list[bytes]:
    """The rows of a whole file, each encoded again."""
    header, *found = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=";")
    assert ";".join(header).encode() + b"\r\n" == CSV_HEADER
    encoded = []
    for cells in found:
        text = io.StringIO()
        csv.writer(text, delimiter=";").writerow(cells)
        encoded.append(text.getvalue().encode())
    return encoded


def rows(*numbers: int) -> bytes:
    return b"".join(map(row, numbers))


def ids(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def append(store: Store, *numbers: int) -> None:
    store.append(rows(*numbers), ids(*numbers))


def crash(store: Store) -> None:
    """Leave a store as it is when its process dies. A thread that compresses outlives no process."""
    for thread in threading.enumerate():
        if thread.name == "rotated":
            thread.join()
    store._file.close()
    store._journal.close()


def asides(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.uncommitted-*"))]


class Case:
    """A folder with a CSV of two committed rows, and what the next start makes of it."""

    def __init__(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.path = path
        self.folder = path.parent
        self.journal = path.with_name("data.csv.journal")
        self.caplog = caplog
        self.store = self.open()
        append(self.store, 1, 2)

    def open(self, **options: Any) -> Store:
        self.caplog.clear()
        return Store.open(str(self.path), 100, 10, log, **options)

    def restart(self) -> str:
        """Open the store again, check that it works, and return its one log line."""
        self.store = self.open()
        assert len(self.lines) == 1
        line = self.lines[0]
        before = self.content
        append(self.store, 9)
        assert self.content == before + row(9)
        assert self.store.seen(*ids(9))
        return line

    @property
    def lines(self) -> list[str]:
        return [record.message for record in self.caplog.records]

    @property
    def content(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder in memory: what a step does matters here, not the speed of a disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Case:
    caplog.set_level(logging.INFO)
    return Case(tmp_path / "data.csv", caplog)


# Recovery


def test_a_first_start_makes_a_file_with_the_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = Store.open(str(tmp_path / "data.csv"), 100, 10, log)
    assert (tmp_path / "data.csv").read_bytes() == CSV_HEADER
    assert store.committed_bytes == len(CSV_HEADER)
    assert not store.has_rows
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_after_a_clean_stop_it_continues_where_it_was(case: Case) -> None:
    case.store.close()
    line = case.restart()
    assert "continues after" in line
    assert case.content == CSV_HEADER + rows(1, 2, 9)
    assert case.store.seen(*ids(1))


@pytest.mark.parametrize("tail", [row(3), rows(3, 4), row(3)[:20], b"\0" * 100, b"x"])
def test_after_a_crash_uncommitted_bytes_are_moved_aside(case: Case, tail: bytes) -> None:
    crash(case.store)
    case.path.write_bytes(case.content + tail)
    line = case.restart()
    assert f"{len(tail)} bytes that the last run had not committed were moved to {case.path}.uncommitted-" in line
    assert case.content == CSV_HEADER + rows(1, 2, 9)
    assert asides(case.folder) == [tail]


def test_bytes_added_after_a_clean_stop_stay_except_a_torn_row(case: Case) -> None:
    """The journal may be an older copy, and these rows committed, so all of them stay."""
    case.store.close()
    case.path.write_bytes(case.content + row(3) + b"torn")
    line = case.restart()
    assert f"has {len(row(3)) + 4} bytes that its journal does not know of, though the last run ended cleanly" in line
    assert case.content == CSV_HEADER + rows(1, 2, 3, 9)
    assert asides(case.folder) == [b"torn"]


@pytest.mark.parametrize("clean", [True, False])
def test_a_missing_csv_is_begun_again_and_the_ids_are_kept(case: Case, clean: bool) -> None:
    case.store.close() if clean else crash(case.store)
    case.path.unlink()
    assert "was missing or empty, and is begun again" in case.restart()
    assert case.content == CSV_HEADER + row(9)
    assert case.store.seen(*ids(1))


@pytest.mark.parametrize("new", [None, b"", CSV_HEADER])
def test_after_a_crash_a_renamed_file_loses_its_uncommitted_end(case: Case, new: bytes | None) -> None:
    """logrotate can run between the crash and the restart."""
    crash(case.store)
    case.path.write_bytes(case.content + row(3)[:30])
    renamed = case.path.rename(case.folder / "data.csv.1")
    if new is not None:
        case.path.write_bytes(new)
    line = case.restart()
    assert f"the file of the last run is now {renamed}; 30 bytes of it that were not committed were moved to" in line
    assert renamed.read_bytes() == CSV_HEADER + rows(1, 2)
    assert case.content == CSV_HEADER + row(9)
    assert asides(case.folder) == [row(3)[:30]]


def test_after_a_clean_stop_a_renamed_file_is_left_alone(case: Case) -> None:
    case.store.close()
    renamed = case.path.rename(case.folder / "archive.csv")
    with renamed.open("ab") as file:
        file.write(row(3))
    case.restart()
    assert renamed.read_bytes() == CSV_HEADER + rows(1, 2, 3)


@pytest.mark.parametrize(
    "length", [0, 10, len(CSV_HEADER), len(CSV_HEADER) + 5, len(CSV_HEADER + row(1)), len(CSV_HEADER + row(1)) + 16]
)
@pytest.mark.parametrize("clean", [True, False])
def test_a_truncated_csv_is_kept_except_for_a_torn_row(case: Case, length: int, clean: bool) -> None:
    case.store.close() if clean else crash(case.store)
    before = case.content
    os.truncate(case.path, length)
    found = f"was truncated or replaced: it has {length} bytes, and {len(before)} were committed"
    assert (found if length else "was missing or empty, and is begun again") in case.restart()
    kept = CSV_HEADER + row(1) if length >= len(CSV_HEADER + row(1)) else CSV_HEADER
    assert case.content == kept + row(9)
    torn = before[len(kept) : length]
    assert asides(case.folder) == ([torn] if torn else [])


@pytest.mark.parametrize("clean", [True, False])
def test_a_replaced_csv_keeps_all_its_rows(case: Case, clean: bool) -> None:
    case.store.close() if clean else crash(case.store)
    case.path.unlink()
    case.path.write_bytes(CSV_HEADER + rows(*range(20, 40)))
    assert "was replaced or changed, or its journal is an older copy" in case.restart()
    assert case.content == CSV_HEADER + rows(*range(20, 40), 9)


def test_a_csv_edited_in_place_keeps_all_its_rows(case: Case) -> None:
    case.store.close()
    case.path.write_bytes(edited := case.content.replace(b"device 1", b"a longer name") + row(3))
    assert "was replaced or changed, or its journal is an older copy" in case.restart()
    assert case.content == edited + row(9)


def test_a_restored_copy_with_another_inode_is_still_our_file(case: Case) -> None:
    crash(case.store)
    shutil.copy(case.path, case.folder / "copy")
    os.replace(case.folder / "copy", case.path)
    with case.path.open("ab") as file:
        file.write(b"torn")
    assert "4 bytes that the last run had not committed were moved" in case.restart()
    assert case.content == CSV_HEADER + rows(1, 2, 9)


@pytest.mark.parametrize("tail", [b"", row(3), row(3)[:20]])
def test_our_file_is_known_under_another_device_number(case: Case, tail: bytes) -> None:
    """After a crash, it is known by its inode and its content."""
    crash(case.store)
    case.path.write_bytes(case.content + tail)
    renumber_device(case.journal)  # as a reboot does to NVMe, LVM and NFS
    line = case.restart()
    assert ("that the last run had not committed were moved" in line) == bool(tail)
    assert "the file of the last run is now" not in line
    assert case.content == CSV_HEADER + rows(1, 2, 9)
    assert asides(case.folder) == ([tail] if tail else [])
    assert all(map(case.store.seen, ids(1, 2)))


def renumber_device(journal: Path) -> None:
    """Make each commit in the journal name another device."""
    lines = []
    for line in journal.read_bytes().splitlines():
        commit = json.loads(line.partition(b" ")[2])
        if "file" in commit:
            commit["file"]["device"] += 1
        text = json.dumps(commit).encode()
        lines.append(b"%08x %b\n" % (zlib.crc32(text), text))
    journal.write_bytes(b"".join(lines))


@pytest.mark.parametrize("how", ["over the file", "as a new file"])
def test_a_csv_put_in_after_an_empty_run_keeps_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """An example is the one that the original program wrote."""
    path = tmp_path / "data.csv"
    Store.open(str(path), 100, 10, log).close()
    if how == "as a new file":
        path.unlink()
    path.write_bytes(CSV_HEADER + rows(1, 2))
    Store.open(str(path), 100, 10, log).close()
    assert path.read_bytes() == CSV_HEADER + rows(1, 2)
    assert asides(tmp_path) == []


@pytest.mark.parametrize("torn", [b"", b"device;", row(3)[:12], row(3)[:-1]])
def test_a_csv_without_a_journal_is_taken_over(case: Case, torn: bytes) -> None:
    """The log says that the promise is then weaker."""
    case.store.close()
    case.journal.unlink()
    with case.path.open("ab") as file:
        file.write(torn)
    line = case.restart()
    assert "without a journal the last rows can be duplicated once" in line
    assert case.content == CSV_HEADER + rows(1, 2, 9)
    assert asides(case.folder) == ([torn] if torn else [])


@pytest.mark.parametrize("damage", [b"", b"\0" * 5000, b"SQLite format 3\0" * 9, os.urandom(3000)])
def test_a_corrupt_journal_is_moved_aside_and_the_rows_stay(case: Case, damage: bytes) -> None:
    case.store.close()
    case.journal.write_bytes(damage)
    line = case.restart()
    assert "the journal is corrupt" in line
    assert "without a journal the last rows" in line
    (aside,) = case.folder.glob("*.journal.corrupt-*")
    assert aside.read_bytes() == damage
    assert case.content == CSV_HEADER + rows(1, 2, 9)


def test_an_older_csv_and_its_journal_continue_together(case: Case) -> None:
    """Both were put back from a backup."""
    case.store.close()
    older = case.content, case.journal.read_bytes()
    case.restart()
    append(case.store, 3)
    case.store.close()
    case.path.write_bytes(older[0])
    case.journal.write_bytes(older[1])
    assert "corrupt" not in case.restart()
    assert case.content == older[0] + row(9)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("damage", ["half of it", "its last bytes", "zeroed", "an old copy"])
def test_a_journal_without_its_end_takes_no_row_away(case: Case, damage: str, clean: bool) -> None:
    old = case.journal.read_bytes()
    for number in range(10, 20):
        append(case.store, number)
    if clean:
        case.store.close()
    else:
        crash(case.store)
    content, whole = case.content, case.journal.read_bytes()
    last_line = len(whole) - whole[:-1].rfind(b"\n")
    case.journal.write_bytes(
        {
            "half of it": whole[: len(whole) // 2],
            "its last bytes": whole[: -last_line - 10],
            "zeroed": whole[: -2 * last_line] + bytes(2 * last_line),
            "an old copy": old,
        }[damage]
    )
    line = case.restart()
    assert "its end is gone" in line
    assert case.content == content + row(9)
    assert case.store.seen(*ids(1))


@pytest.mark.parametrize(
    "content", [b"a;b;c\r\n1;2;3\r\n", CSV_HEADER[:-2] + b"\n", b"\xef\xbb\xbf" + CSV_HEADER, b"\0" * 100]
)
def test_a_file_that_is_not_ours_is_refused_and_not_touched(case: Case, content: bytes) -> None:
    case.store.close()
    case.path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StartupError, match=r"data.csv: does not begin with the line 'device_id;.*move it away"):
            case.open()
    assert case.content == content
    assert asides(case.folder) == []


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
@pytest.mark.parametrize("name", ["", ".lock", ".journal", ".committed", ".journal.mark", ".journal.new"])
def test_an_odd_file_at_a_start_is_one_clear_line(tmp_path: Path, name: str, kind: str) -> None:
    """It never hangs."""
    path = tmp_path / f"data.csv{name}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else:
        pytest.skip("making a device needs root")
    if name in (".journal.new", ".journal.mark") and kind != "folder":
        Store.open(str(tmp_path / "data.csv"), 100, 10, log).close()  # it is removed, as what a crash left
        return

    def start() -> None:
        Lock(str(tmp_path / "data.csv")).acquire()
        Store.open(str(tmp_path / "data.csv"), 100, 10, log)

    with pytest.raises(StartupError, match=re.escape(str(path))) as caught:
        start()
    assert "\n" not in str(caught.value)


def test_only_temporary_files_of_ours_are_removed_by_a_start(case: Case) -> None:
    ours = [
        "data.csv.gz.part",
        "data-20260101T000000Z.csv.gz.part",
        "data-20260101T000000Z-1.csv.gz.part",
        "data.csv.uncommitted-20260101T000000Z.part",
        "data.csv.journal.new",
    ]
    others = [
        "data-20260101T000000Z.csv",
        "data-mine.csv.gz.part",
        "other-20260101T000000Z.csv.gz.part",
        "data.csv.uncommitted-20260101T000000Z",
    ]
    case.store.close()
    before = os.listdir(case.folder)
    for name in ours + others:
        (case.folder / name).touch()
    case.open().close()
    assert sorted(os.listdir(case.folder)) == sorted(before + others)


def modes(folder: Path) -> dict[str, int]:
    """Return the modes of all files except the mark, which has no row and is for every reader."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.suffix != ".committed"}


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_whatever_is_made_beside_a_csv_has_its_mode(case: Case, mode: int) -> None:
    """It is rotated, compressed, set aside, begun again, rewritten, also after a crash in the middle of a rotation."""
    case.store.close()
    case.store = case.open(rotate_gzip=True)
    case.path.chmod(mode)
    append(case.store, 3)
    rotated = case.store.rotate()
    wait_until("it is compressed", lambda: os.path.exists(f"{rotated}.gz") and not os.path.exists(str(rotated)))
    append(case.store, 4)
    case.path.rename(case.folder / "data.csv.1")  # as logrotate does
    append(case.store, 5)
    with case.path.open("ab") as file:
        file.write(b"foreign")
    append(case.store, 6)
    case.journal.unlink()
    append(case.store, 7)
    crash(case.store)
    assert set(modes(case.folder).values()) == {mode}
    case.path.rename(case.folder / "data-20260101T000000Z.csv")
    case.restart()
    assert set(modes(case.folder).values()) == {mode}


def test_the_mode_of_a_csv_that_another_program_made_is_kept(case: Case) -> None:
    """An example is logrotate's `create`."""
    case.path.rename(case.folder / "data.csv.1")
    case.path.touch()
    case.path.chmod(0o640)
    append(case.store, 3)
    found = modes(case.folder)
    assert [found[name] for name in ("data.csv", "data.csv.journal")] == [0o640] * 2


def test_a_file_in_place_of_the_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(StartupError, match=r"csv.lock: Not a directory; set CSV_FILE to a file in a folder$"):
        Lock(str(tmp_path / "data" / "data.csv")).acquire()


@pytest.mark.parametrize(
    ("call", "code", "advice"),
    [
        ("open", errno.EACCES, "Permission denied; let uid"),
        ("open", errno.EROFS, "Read-only file system; mount it writable"),
        ("fsync", errno.ENOSPC, "No space left on device; free some space"),
        ("rename", errno.EIO, "Input/output error"),
    ],
)
def test_trouble_at_the_start_is_one_clear_line(
    case: Case, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    """The next start works."""
    crash(case.store)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((StartupError, DiskTrouble), match=f"data.csv.*: {advice}") as caught:
            case.open()
    assert "\n" not in str(caught.value)
    case.restart()
    assert case.content == CSV_HEADER + rows(1, 2, 9)


def test_a_second_store_on_the_same_file_is_refused(case: Case) -> None:
    with pytest.raises(DiskTrouble, match="is in use by another consumer"):
        case.open()
    append(case.store, 3)
    assert case.content == CSV_HEADER + rows(1, 2, 3)


# Running


def fail_at(patch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Let three calls that change the disk fail, from the `step`-th on; a write after half of it. Return a counter."""
    calls = 0

    def wrap(name: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if step <= calls < step + 3:
                if name == "write":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(errno.EIO, os.strerror(errno.EIO), *(arg for arg in args[:1] if isinstance(arg, str)))
            return original(*args)

        patch.setattr(os, name, call)

    for name in ("open", "write", "fsync", "ftruncate", "rename"):
        wrap(name)
    return lambda: calls


def until_it_works(action: Callable[[], object]) -> None:
    for _ in range(10):
        try:
            action()
        except OSError as error:
            if not error.filename:
                raise AssertionError("a person could not tell which file it was") from error
        else:
            return
    raise AssertionError("never worked")


@pytest.mark.parametrize("trouble", ["nothing", "a renamed file", "foreign bytes", "a truncated file", "no journal"])
def test_an_append_failed_at_any_step_continues_from_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    for step in count(1):
        (tmp_path / str(step)).mkdir()
        case = Case(tmp_path / str(step) / "data.csv", caplog)
        if trouble == "a renamed file":
            case.path.rename(case.folder / "data.csv.1")
        elif trouble == "foreign bytes":
            case.path.write_bytes(case.content + row(7))
        elif trouble == "a truncated file":
            os.truncate(case.path, 0)
        elif trouble == "no journal":
            case.journal.unlink()
        with pytest.MonkeyPatch().context() as patch:
            calls = fail_at(patch, step)
            until_it_works(lambda case=case: append(case.store, 3, 4))  # type: ignore[misc]
        kept = b"" if trouble in ("a renamed file", "a truncated file") else rows(1, 2)
        assert case.content == CSV_HEADER + kept + rows(3, 4)
        assert set(asides(case.folder)) == ({row(7)} if trouble == "foreign bytes" else set())
        crash(case.store)
        case.restart()
        assert case.content == CSV_HEADER + kept + rows(3, 4, 9)
        assert all(case.store.seen(id) for id in ids(1, 2, 3, 4))
        crash(case.store)
        if calls() < step:
            break
    assert step > 4


def test_a_rotation_failed_at_any_step_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It also duplicates nothing."""
    for step in count(1):
        (tmp_path / str(step)).mkdir()
        case = Case(tmp_path / str(step) / "data.csv", caplog)
        with pytest.MonkeyPatch().context() as patch:
            calls = fail_at(patch, step)
            until_it_works(case.store.rotate)
            until_it_works(lambda case=case: append(case.store, 3))  # type: ignore[misc]
        (rotated,) = case.folder.glob("data-*.csv")
        assert rotated.read_bytes() == CSV_HEADER + rows(1, 2)
        assert case.content == CSV_HEADER + row(3)
        crash(case.store)
        if calls() < step:
            break
    assert step > 6


def test_after_a_failed_fsync_everything_is_written_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = CsvFile.write

    def spy(file: CsvFile, data: bytes) -> None:
        written.append(data)
        write(file, data)

    def fail(file: CsvFile) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(CsvFile, "write", spy)
    with monkeypatch.context() as patch:
        patch.setattr(CsvFile, "sync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            append(case.store, 3)
    assert case.content == CSV_HEADER + rows(1, 2)
    append(case.store, 3)
    assert written == [row(3), row(3)]


def test_after_a_failed_commit_only_the_commit_is_retried(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows stay, since the commit may be on disk."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", fail)
        with pytest.raises(OSError, match="No space left on device"):
            append(case.store, 3)
    assert case.content == CSV_HEADER + rows(1, 2, 3)
    assert not case.store.seen(*ids(3))
    assert case.store.rotate() is None
    with pytest.raises(ValueError, match="the batch before is not committed"):
        append(case.store, 4)
    with monkeypatch.context() as patch:
        patch.setattr(CsvFile, "write", fail)
        append(case.store, 3)
    assert case.content == CSV_HEADER + rows(1, 2, 3)


def test_a_store_closed_before_a_commit_is_not_clean(case: Case, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_append", fail)
        with pytest.raises(OSError, match="No space"):
            append(case.store, 3)
    case.store.close()
    assert "that the last run had not committed" in case.restart()
    assert case.content == CSV_HEADER + rows(1, 2, 9)


def test_an_append_returns_how_long_each_step_took(case: Case, monkeypatch: Any) -> None:
    """The steps are a write and two fsyncs: of the CSV and of the journal."""
    now = 0.0
    fsync = os.fsync

    def takes(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*args)

        return slow

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(CsvFile, "write", takes(1.0, CsvFile.write))
    monkeypatch.setattr(os, "fsync", takes(10.0, fsync))
    monkeypatch.setattr(Journal, "_append", takes(100.0, Journal._append))
    assert case.store.append(row(3), ids(3)) == (1.0, 10.0, 110.0)


def test_ids_without_rows_and_rows_without_ids_are_kept(case: Case) -> None:
    case.store.append(b"", ids(3))
    case.store.append(row(4), [])
    case.store.append(b"", [])
    crash(case.store)
    case.restart()
    assert case.store.seen(*ids(3))
    assert case.content == CSV_HEADER + rows(1, 2, 4, 9)


def test_an_id_of_another_length_is_refused(case: Case) -> None:
    """That happens before anything is written."""
    with pytest.raises(ValueError, match="16 bytes"):
        case.store.append(row(3), [b"short"])
    assert case.content == CSV_HEADER + rows(1, 2)


def test_bytes_of_another_program_are_moved_aside(case: Case) -> None:
    """They were appended between two batches."""
    with case.path.open("ab") as file:
        file.write(b"foreign")
    append(case.store, 3)
    assert case.content == CSV_HEADER + rows(1, 2, 3)
    assert asides(case.folder) == [b"foreign"]
    assert f"7 bytes from another program were moved to {case.path}.uncommitted-" in case.lines[-1]


def test_bytes_added_between_check_and_write_are_moved_aside(case: Case, monkeypatch: Any) -> None:
    write = CsvFile.write

    def race(file: CsvFile, data: bytes) -> None:
        os.write(file._fd, b"foreign")
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(CsvFile, "write", race)
        with pytest.raises(OSError, match="another program wrote to it at the same moment"):
            append(case.store, 3)
    append(case.store, 3)
    assert case.content == CSV_HEADER + rows(1, 2, 3)
    assert asides(case.folder) == [b"foreign" + row(3)]


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced by an empty file", "replaced by a CSV"])
def test_the_next_rows_are_in_the_file_at_the_path(case: Case, how: str) -> None:
    """It does not matter how the CSV went away while the consumer ran."""
    if how == "removed":
        case.path.unlink()
    else:
        case.path.rename(case.folder / "data.csv.1")
    if how == "replaced by an empty file":
        case.path.touch()
    elif how == "replaced by a CSV":
        case.path.write_bytes(CSV_HEADER + row(7))
    append(case.store, 3)
    begin = CSV_HEADER + row(7) if how == "replaced by a CSV" else CSV_HEADER
    assert case.content == begin + row(3)
    if how != "removed":
        assert (case.folder / "data.csv.1").read_bytes() == CSV_HEADER + rows(1, 2)
    assert "was renamed, removed or replaced" in case.lines[-1]
    crash(case.store)
    case.restart()
    assert case.content == begin + rows(3, 9)
    assert case.store.seen(*ids(1))


def test_reopen_starts_a_new_file_at_once(case: Case) -> None:
    case.store.reopen()
    assert case.content == CSV_HEADER + rows(1, 2)
    case.path.rename(case.folder / "data.csv.1")
    case.store.reopen()
    assert case.content == CSV_HEADER


def test_copytruncate_of_logrotate_keeps_the_file_whole(case: Case) -> None:
    shutil.copy(case.path, case.folder / "data.csv.1")
    os.truncate(case.path, 0)
    append(case.store, 3)
    assert case.content == CSV_HEADER + row(3)
    assert "was truncated or changed" in case.lines[-1]


@pytest.mark.parametrize("left", [0, len(CSV_HEADER), len(CSV_HEADER) + 10])
def test_a_truncation_just_before_the_write_leaves_no_rows_without_a_header(
    case: Case, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    write = CsvFile.write

    def truncated(file: CsvFile, data: bytes) -> None:
        monkeypatch.undo()
        os.truncate(case.path, left)
        write(file, data)

    monkeypatch.setattr(CsvFile, "write", truncated)
    with pytest.raises(OSError, match="at the same moment"):
        append(case.store, 3)
    append(case.store, 3)
    assert case.content == CSV_HEADER + row(3)


@pytest.mark.parametrize("left", ["the committed rows", "a part of them"])
def test_a_truncation_just_after_the_write_cuts_no_equal_rows(
    case: Case, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    case.store.append(row(3), [])
    committed, sync = case.content, CsvFile.sync

    def truncated(file: CsvFile) -> None:
        monkeypatch.undo()
        sync(file)
        os.truncate(case.path, len(committed) if left == "the committed rows" else len(committed) - len(row(3)))

    monkeypatch.setattr(CsvFile, "sync", truncated)
    with pytest.raises(OSError, match="at the same moment"):
        case.store.append(row(3), [])
    case.store.append(row(3), [])
    assert case.content == CSV_HEADER + rows(1, 2) + row(3) * (2 if left == "the committed rows" else 1)


def test_an_equal_batch_is_never_taken_for_the_rest_of_a_write(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of a batch fails in its middle, and the same rows are committed just before it."""
    case.store.append(row(3) * 2, [])
    write = CsvFile.write

    def fails(file: CsvFile, data: bytes) -> None:
        monkeypatch.undo()
        write(file, data[: len(row(3))])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CsvFile, "write", fails)
    with pytest.raises(OSError, match="No space"):
        case.store.append(row(3) * 2, [])
    case.store.append(row(3) * 2, [])
    assert case.content == CSV_HEADER + rows(1, 2, 3, 3, 3, 3)


def test_a_file_of_another_consumer_with_the_same_inode_number_keeps_no_start_waiting(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CSV was removed after a crash, and a file system uses its number again: here the same file is locked."""
    crash(case.store)
    other = CsvFile(str(case.path.rename(case.folder / "data.1.csv")))
    try:
        case.open()
    finally:
        other.close()
    assert "not in this folder under any name" in case.lines[0]


def test_a_foreign_file_put_there_while_running_is_left_alone(case: Case) -> None:
    """Rows wait until that file is gone."""
    case.path.unlink()
    case.path.write_bytes(b"mine, mine, mine")
    for _ in range(2):
        with pytest.raises(OSError, match="does not begin with the line"):
            append(case.store, 3)
    assert case.content == b"mine, mine, mine"
    case.path.unlink()
    append(case.store, 3)
    assert case.content == CSV_HEADER + row(3)


# Rotation


def test_a_rotated_file_has_a_name_of_its_own(case: Case) -> None:
    """The new file has its header."""
    rotated = []
    for number in range(3, 6):
        rotated.append(case.store.rotate())
        assert case.content == CSV_HEADER
        append(case.store, number)
    assert len(set(rotated)) == 3
    assert [Path(name or "").read_bytes() for name in rotated] == [
        CSV_HEADER + rows(1, 2),
        CSV_HEADER + row(3),
        CSV_HEADER + row(4),
    ]
    assert all(Path(name or "").name.startswith("data-20") for name in rotated)
    assert case.store.seen(*ids(1))
    crash(case.store)
    case.restart()
    assert case.content == CSV_HEADER + rows(5, 9)


def test_a_file_without_rows_is_not_rotated(case: Case) -> None:
    case.store.rotate()
    assert case.store.rotate() is None
    assert len(list(case.folder.glob("data-*"))) == 1


def test_a_period_counts_from_the_first_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts over all runs. A file without rows is never due."""
    case.store.rotate()
    now = 1_699_920_000.0  # midnight
    monkeypatch.setattr(time, "time", lambda: now)
    append(case.store, 3)
    now += 1000
    append(case.store, 4)
    for clean in (True, False):
        case.store.close() if clean else crash(case.store)
        case.store = case.open()
        assert not case.store.period_due(0)
        assert not case.store.period_due(86_400)
        now += 40_000
    now += 10_000
    assert case.store.period_due(86_400)
    case.store.rotate()
    now += 86_400
    assert not case.store.period_due(86_400)


def test_rotated_files_are_compressed(case: Case) -> None:
    """Those that an earlier run left plain are compressed, too."""
    left = case.store.rotate()
    append(case.store, 3)
    (case.folder / "data-of-mine.csv").write_bytes(CSV_HEADER)
    case.store.close()
    case.store = case.open(rotate_gzip=True)
    rotated = case.store.rotate()
    append(case.store, 4)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and list(case.folder.glob("data-20*.csv")):
        time.sleep(0.005)
    assert gzip.decompress(Path(f"{left}.gz").read_bytes()) == CSV_HEADER + rows(1, 2)
    assert gzip.decompress(Path(f"{rotated}.gz").read_bytes()) == CSV_HEADER + row(3)
    assert case.content == CSV_HEADER + row(4)
    assert (case.folder / "data-of-mine.csv").exists()
    case.store.close()


# Files that move


def test_a_link_to_the_csv_leads_to_the_same_lock_and_file(case: Case) -> None:
    (case.folder / "link.csv").symlink_to(case.path)
    assert Lock(str(case.folder / "link.csv")).path == Lock(str(case.path)).path
    case.store.close()
    store = Store.open(str(case.folder / "link.csv"), 100, 10, log)
    append(store, 3)
    store.rotate()
    assert (case.folder / "link.csv").read_bytes() == CSV_HEADER


def test_a_repointed_link_is_followed_by_a_restart(case: Case) -> None:
    """Until then, rows go to the file that is open, and SIGHUP logs where that is."""
    link, new = case.folder / "link.csv", case.folder / "new" / "data.csv"
    link.symlink_to(case.path)
    case.store.close()
    case.store = Store.open(str(link), 100, 10, log)
    link.unlink()
    link.symlink_to(new)
    case.caplog.clear()
    append(case.store, 3)
    case.store.reopen()
    append(case.store, 4)
    assert case.content == CSV_HEADER + rows(1, 2, 3, 4)
    assert case.lines == [f"{link} leads to {new} now; rows go to {case.path} until a restart"]
    case.path.rename(case.folder / "data.csv.1")
    append(case.store, 6)
    assert case.content == CSV_HEADER + row(6)
    case.store.close()
    assert not new.parent.exists()
    assert Lock(str(link)).acquire()
    Store.open(str(link), 100, 10, log).close()
    assert new.read_bytes() == CSV_HEADER


def test_a_data_folder_that_is_made_again_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second consumer waits, although the lock file is gone."""
    path = tmp_path / "data" / "data.csv"
    lock = Lock(str(path))
    assert lock.acquire()
    store = Store.open(str(path), 100, 10, log, lock=lock)
    append(store, 1)
    shutil.rmtree(path.parent)
    append(store, 2)
    append(store, 3)
    assert path.read_bytes() == CSV_HEADER + rows(2, 3)
    assert sorted(os.listdir(path.parent)) == [f"data.csv{end}" for end in ("", ".committed", ".journal")]
    with pytest.raises(DiskTrouble, match="is in use by another consumer"):
        Store.open(str(path), 100, 10, log)
    crash(store)
    store = Store.open(str(path), 100, 10, log)
    assert all(map(store.seen, ids(1, 2, 3)))
    store.close()


@pytest.mark.parametrize("how", ["compressed", "moved to another folder"])
def test_a_file_out_of_sight_after_a_crash_is_reported(case: Case, how: str) -> None:
    """What was not committed there cannot be cut, and comes again. The log says so, and where it begins."""
    crash(case.store)
    case.path.write_bytes(case.content + row(3))
    length = len(CSV_HEADER + rows(1, 2))
    if how == "compressed":
        Path(f"{case.path}.1.gz").write_bytes(gzip.compress(case.content))
        case.path.unlink()
    else:
        (case.folder / "old").mkdir()
        case.path.rename(case.folder / "old" / "data.csv")
    line = case.restart()
    assert "the file of the last run is not in this folder under any name" in line
    assert f"its rows after the first {length} bytes were not committed, and are written again" in line


@pytest.mark.parametrize("with_mark", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_a_journal_put_back_without_its_csv_moves_no_row(case: Case, with_mark: bool, rotated: bool) -> None:
    """A later run committed its rows. The log blames no other program."""
    case.store.close()
    kept = {path: path.read_bytes() for path in case.folder.glob("*.journal*")}
    case.store = case.open()
    append(case.store, 3, 4)
    if rotated:
        case.store.rotate()
        append(case.store, 5)
    case.store.close()
    content = case.content
    for path, data in kept.items():
        if with_mark or path == case.journal:
            path.write_bytes(data)
    line = case.restart()
    assert case.content == content + row(9)
    assert asides(case.folder) == []
    assert "another program" not in line


# Two writers, and locks without effect


def overtake(case: Case, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A second store on the same CSV, as if locks did nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: None)
        return case.open()


def test_a_store_that_was_overtaken_stops_and_touches_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    later = overtake(case, monkeypatch)
    append(later, 3)
    with pytest.raises(TakenOver):
        append(case.store, 4)
    with pytest.raises(TakenOver):
        append(case.store, 4)
    with pytest.raises(TakenOver):
        case.store.rotate()
    case.store.close()
    append(later, 4)
    assert case.content == CSV_HEADER + rows(1, 2, 3, 4)
    later.close()
    assert len(case.open()._journal) == 4


def test_an_overtaken_store_rotates_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """That holds even while the other has written nothing yet, so that the file is as this one left it."""
    later = overtake(case, monkeypatch)
    with pytest.raises(TakenOver):
        case.store.rotate()
    assert case.content == CSV_HEADER + rows(1, 2)
    assert not list(case.folder.glob("data-*.csv"))
    case.store.close()
    later.close()


def test_rows_of_an_overtaken_store_are_set_aside(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote them before it noticed the other. It acks nothing, and the other stores them again."""
    later = overtake(case, monkeypatch)
    with pytest.raises(TakenOver):
        append(case.store, 3)
    case.store.close()
    assert case.content == CSV_HEADER + rows(1, 2, 3)
    append(later, 4)
    append(later, 3)
    assert case.content == CSV_HEADER + rows(1, 2, 4, 3)
    assert asides(case.folder) == [row(3)]
    later.close()


# Anything in any order


class Life(RuleBasedStateMachine):
    """Batches, crashes at any step, rotations, people and other programs, against a list of what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.path = self.folder / "data.csv"
        self.next = 0
        self.expected: Counter[bytes] = Counter()
        self.foreign: list[bytes] = []  # what another program wrote, which must be kept
        self.dirty = False  # and is still in the CSV
        self.store = self.open()

    def open(self) -> Store:
        return Store.open(str(self.path), 1000, 10, log)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.append(1)
            self.all_is_there_once()
            kept = asides(self.folder)
            assert all(any(foreign in aside for aside in kept) for foreign in self.foreign)
            self.store.close()
        shutil.rmtree(self.folder)

    def batch(self, size: int) -> list[int]:
        numbers = list(range(self.next, self.next + size))
        self.next += size
        self.expected.update(map(row, numbers))
        return numbers

    def deliver(self, numbers: list[int]) -> None:
        fresh = [number for number in numbers if not self.store.seen(*ids(number))]
        append(self.store, *fresh)
        self.dirty = self.dirty and not fresh

    @rule(size=st.integers(0, 3))
    def append(self, size: int) -> None:
        self.deliver(self.batch(size) or [self.next - 1] * bool(self.next))

    @rule(again=st.integers(1, 8))
    def redeliver(self, again: int) -> None:
        self.deliver(list(range(max(0, self.next - again), self.next)))

    @rule(
        step=st.integers(1, 12),
        torn=st.booleans(),
        size=st.integers(1, 3),
        action=st.sampled_from(["append", "rotate", "open"]),
    )
    def crash(self, step: int, torn: bool, size: int, action: str) -> None:
        numbers = self.batch(size)
        if action == "open":
            crash(self.store)
        if (pid := os.fork()) == 0:
            try:
                die_before(step, torn)
                if action == "open":
                    self.store = self.open()
                elif action == "rotate":
                    self.store.rotate()
                append(self.store, *numbers)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        if action != "open":
            crash(self.store)
        self.store = self.open()
        self.deliver(numbers)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = self.open()
        self.dirty = False

    @rule()
    def rotate(self) -> None:
        self.store.rotate()
        self.dirty = False

    @precondition(lambda self: not self.dirty)
    @rule(reopen=st.booleans())
    def logrotate(self, reopen: bool) -> None:
        if self.path.exists():
            self.path.rename(self.folder / f"renamed-{len(os.listdir(self.folder))}")
        if reopen:
            self.store.reopen()

    @precondition(lambda self: not self.dirty and self.store.has_rows and self.path.exists())
    @rule(data=st.sampled_from([b"x", row(10**6), row(10**6) + b"x"]))
    def another_program_appends(self, data: bytes) -> None:
        data = data.replace(b"x", b"x%d" % len(self.foreign))
        with self.path.open("ab") as file:
            file.write(data)
        self.foreign.append(data)
        self.dirty = True

    @precondition(lambda self: not self.dirty and self.path.exists())
    @rule(part=st.floats(0, 1))
    def somebody_truncates(self, part: float) -> None:
        content = self.path.read_bytes()
        length, end = int(len(content) * part), len(CSV_HEADER)
        for each in records(content):
            end += len(each)
            self.expected[each] -= end > length
        os.truncate(self.path, length)
        self.append(1)

    @precondition(lambda self: self.path.exists())
    @rule()
    def somebody_removes_the_journal(self) -> None:
        Path(f"{self.path}.journal").unlink(missing_ok=True)
        self.append(1)

    @invariant()
    def all_is_there_once(self) -> None:
        if self.dirty or not hasattr(self, "store"):
            return
        found: Counter[bytes] = Counter()
        for path in self.folder.iterdir():
            if any(part in path.name for part in (".uncommitted-", ".journal", ".committed")):
                continue
            whole = records(path.read_bytes())
            assert path.read_bytes() == CSV_HEADER + b"".join(whole)
            found.update(whole)
        assert found == +self.expected


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
