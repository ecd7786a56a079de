"""The store on a real disk in trouble: full, limited, read-only, not ours. The file stays whole, and work continues."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import resource
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import DiskTrouble, StartupError
from common.event.rows import CSV_HEADER
from common.storage import rotation
from common.storage.lock import Lock
from common.storage.store import Store
from tests.support.polling import wait_until

PAGE_BYTES = 4096
ROW = b"device;client;2024;license;" + b"frame" * 200 + b";0.5;cat\r\n"
log = logging.getLogger(__name__)


def message_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def open_store(folder: Path) -> Store:
    return Store.open(str(folder / "data.csv"), 1000, 10, log)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 pages."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={64 * PAGE_BYTES}", "tmpfs", tmp_path])
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fill(disk: Path, free_pages: int) -> Path:
    """Fill the disk except for `free_pages` with one file, and return it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * PAGE_BYTES)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() // PAGE_BYTES - free_pages) * PAGE_BYTES)
    return ballast


@pytest.mark.parametrize("free_pages", range(9))
def test_on_a_full_disk_an_append_leaves_the_file_whole(disk: Path, free_pages: int) -> None:
    """The append fails, and succeeds once there is space."""
    store = open_store(disk)
    store.append(ROW, [message_id(0)])
    before = (disk / "data.csv").read_bytes()
    ballast = fill(disk, free_pages)
    data, ids = ROW * 24, [message_id(number) for number in range(1, 500)]  # seven pages, and four in the journal
    for _ in range(3):
        with pytest.raises(OSError, match="No space left on device") as caught:
            store.append(data, ids)
        assert str(caught.value.filename).startswith(str(disk / "data.csv"))
        assert (disk / "data.csv").read_bytes() in (before, before + data)
        assert not store.seen(ids[0])
    ballast.unlink()
    store.append(data, ids)
    assert (disk / "data.csv").read_bytes() == CSV_HEADER + ROW + data
    assert store.seen(ids[0])
    store.close()
    assert sorted(os.listdir(disk)) == ["data.csv", "data.csv.committed", "data.csv.journal"]


def test_a_crash_on_a_full_disk_loses_no_committed_row(disk: Path) -> None:
    store = open_store(disk)
    store.append(ROW, [message_id(0)])
    ballast = fill(disk, 3)
    with pytest.raises(OSError, match="No space left on device"):
        store.append(ROW * 24, [message_id(1)])
    store._file.close()
    store._journal.close()
    fill(disk, 0)
    with pytest.raises(DiskTrouble, match=r"No space left on device; free some space$"):
        open_store(disk)
    ballast.unlink()
    store = open_store(disk)
    assert store.seen(message_id(0))
    assert not store.seen(message_id(1))
    store.append(ROW * 2, [message_id(1)])
    assert (disk / "data.csv").read_bytes() == CSV_HEADER + ROW * 3
    store.close()


def test_rotation_on_a_full_disk_continues_with_space(disk: Path) -> None:
    store = open_store(disk)
    store.append(ROW, [message_id(0)])
    ballast = fill(disk, 0)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            store.rotate()
    ballast.unlink()
    store.append(ROW * 2, [message_id(1)])
    assert (disk / "data.csv").read_bytes() == CSV_HEADER + ROW * 2
    (rotated,) = disk.glob("data-*.csv")
    assert rotated.read_bytes() == CSV_HEADER + ROW
    store.close()


def test_compression_never_keeps_rows_from_the_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its temporary file fills the disk during an append. It gives up, and the next attempt stores the rows."""
    store = Store.open(str(disk / "data.csv"), 1000, 10, log, rotate_gzip=True)
    noise = b"".join(b"%s;c;2024;license;frame;0.5;cat\r\n" % os.urandom(3000).hex().encode() for _ in range(17))
    store.append(noise, [message_id(0)])  # a hundred kilobytes that compress to fifty
    packing, go_on = threading.Event(), threading.Event()
    write = gzip.GzipFile.write

    def slow(file: gzip.GzipFile, data: bytes) -> int:
        count = write(file, data)
        file.flush()
        packing.set()
        go_on.wait(10)
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "BLOCK_BYTES", 4096)
        patch.setattr(gzip.GzipFile, "write", slow)
        rotated = store.rotate()
        assert rotated
        assert packing.wait(10)
        fill(disk, 0)
        with pytest.raises(OSError, match="No space left on device"):
            store.append(ROW * 10, [message_id(1)])
        go_on.set()
        wait_until("the part is gone", lambda: not list(disk.glob("*.gz.part")))
    assert Path(rotated).read_bytes() == CSV_HEADER + noise
    (disk / "ballast").unlink()
    store.append(ROW * 10, [message_id(1)])
    store.close()
    line = "No space left on device; free some space; it is tried again after the next rotation"
    wait_until("the log says so", lambda: line in caplog.text)


def test_compression_on_a_full_disk_leaves_no_part(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next start removes what a crash left of it, regardless of the settings."""
    store = open_store(disk)
    noise = b"".join(b"%s;c;2024;license;frame;0.5;cat\r\n" % os.urandom(3000).hex().encode() for _ in range(17))
    store.append(noise, [message_id(0)])
    rotated = store.rotate()
    store.append(ROW, [message_id(1)])
    store.close()
    ballast = fill(disk, 3)
    store = Store.open(str(disk / "data.csv"), 1000, 10, log, rotate_gzip=True)
    wait_until("it is logged", lambda: "it is tried again after the next rotation or start" in caplog.text)
    store.append(ROW, [message_id(2)])
    store.close()
    ballast.unlink()
    assert sorted(path.name for path in disk.glob("data-*")) == [os.path.basename(str(rotated))]
    part, part_of_1_0 = disk / "data.csv.gz.part", Path(f"{rotated}.gz.part")
    part.write_bytes(b"left by kill -9")
    part_of_1_0.touch()
    fill(disk, 0)
    open_store(disk).close()
    assert not part.exists()
    assert not part_of_1_0.exists()


def test_a_read_only_disk_is_one_clear_line_at_the_start(disk: Path) -> None:
    open_store(disk).close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StartupError, match=r"Read-only file system; mount it writable, or set CSV_FILE"):
        open_store(disk)
    with pytest.raises(StartupError, match="Read-only file system"):
        Lock(str(disk / "folder" / "data.csv")).acquire()


def in_a_process_of_its_own(action: Callable[[], None]) -> None:
    if (pid := os.fork()) == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("room", [0, 1, len(ROW), 2 * len(ROW) - 1])
def test_at_a_file_size_limit_a_short_write_is_taken_back(tmp_path: Path, room: int) -> None:
    """Later, all of it is written."""

    def limited() -> None:
        store = open_store(tmp_path)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(CSV_HEADER) + room, hard))
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                store.append(ROW * 2, [message_id(0)])
            assert (tmp_path / "data.csv").read_bytes() == CSV_HEADER
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.append(ROW * 2, [message_id(0)])
        store.close()

    in_a_process_of_its_own(limited)
    assert (tmp_path / "data.csv").read_bytes() == CSV_HEADER + ROW * 2


@pytest.mark.parametrize("existing", [False, True])
def test_a_path_that_may_not_be_written_is_one_clear_line(existing: bool) -> None:
    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(StartupError, match=rf"data.csv: Permission denied; let uid {os.geteuid()} read and write"):
            open_store(folder)
        with pytest.raises(StartupError, match=r"data.csv.lock: Permission denied"):
            Lock(str(folder / "data.csv")).acquire()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if existing:
            open_store(folder).close()
            (folder / "data.csv").chmod(0o444)
        folder.chmod(0o555)
        in_a_process_of_its_own(as_nobody)
        folder.chmod(0o755)
