"""The committed rows for readers: whole rows that are never taken back, at every moment of the store's life."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path

import pytest

from common.errors import StartupError
from common.event.rows import CSV_HEADER
from common.storage import reader
from common.storage.reader import committed_rows
from common.storage.store import Store

log = logging.getLogger(__name__)
log.setLevel(logging.ERROR)


def row(number: int) -> bytes:
    return b'device;"two\r\nlines %s";2024;license;frame.jpg;0.%06d;cat\r\n' % (b"x" * (number % 30), number)


def message_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def committed(path: Path) -> bytes:
    return b"".join(committed_rows(str(path)))


def ends_of_rows(content: bytes) -> set[int]:
    """Return where a CSV can end so that it has the header and whole rows."""
    assert content.startswith(CSV_HEADER)
    return {match.end() for match in re.finditer(rb'(?:[^"\r]|"[^"]*")*\r\n', content)}


def store_without_end(path: Path, rotates: bool) -> None:
    """Append batches until killed, through a full disk."""
    store = Store.open(str(path), 1000, 10, log)
    chance = random.Random()
    for number in count(time.time_ns()):
        batch = b"".join(row(chance.randrange(10**6)) for _ in range(chance.randrange(1, 30)))
        while True:
            try:
                store.append(batch, [message_id(number)])
                break
            except OSError:
                time.sleep(0.001)
        if rotates and chance.random() < 0.02:
            try:
                store.rotate()
            except OSError:
                time.sleep(0.001)


def begin(path: Path, rotates: bool) -> int:
    if (pid := os.fork()) == 0:
        try:
            store_without_end(path, rotates)
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def live_with_kills(path: Path, rotates: bool, lives: int, each: Callable[[int], None] = lambda life: None) -> None:
    for life in range(lives):
        pid = begin(path, rotates)
        try:
            each(life)
            time.sleep(random.uniform(0.05, 0.25))  # killed at any moment
        finally:
            kill(pid)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


class Readers:
    """A thread that reads repeatedly; `outputs` are the results in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.outputs: list[bytes] = []
        self.failures: list[str] = []

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                output = committed(self._path)
                if self.outputs[-1:] != [output]:
                    self.outputs.append(output)
            except StartupError as error:
                self.failures.append(str(error))

    def __enter__(self) -> Readers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_each_output_is_whole_rows_and_a_prefix_of_later_ones(disk: Path) -> None:
    """This is under load, with kills and a full disk."""
    path = disk / "data.csv"
    Store.open(str(path), 1000, 10, log).close()
    ballast = disk / "ballast"

    def fill(life: int) -> None:
        if life % 4 == 2:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                file.write(bytes(32 << 20))
        elif ballast.exists():
            ballast.unlink()

    with Readers(path) as readers:
        live_with_kills(path, False, 12, fill)
    assert readers.failures == []
    outputs = [*readers.outputs, committed(path)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(outputs))
    assert {len(output) for output in outputs} <= ends_of_rows(outputs[-1])
    assert len(set(outputs)) > 20


def test_a_reader_is_right_through_rotations(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output is a prefix of one of the files.

    A kill within a rotation leaves no CSV until the next start, and the reader waits for it.
    """
    monkeypatch.setattr(reader, "_PATIENCE_SECONDS", 60.0)
    path, reserve = disk / "data.csv", disk / "reserve"
    reserve.write_bytes(bytes(4 << 20))
    Store.open(str(path), 1000, 10, log).close()
    with Readers(path) as readers:
        live_with_kills(path, True, 10)
        reserve.unlink()  # a fast machine has filled the disk, and the last start needs some room
        Store.open(str(path), 1000, 10, log).close()
    assert readers.failures == []
    files = [(content, ends_of_rows(content)) for content in (file.read_bytes() for file in disk.glob("data*.csv"))]
    assert len(files) > 5
    for output in dict.fromkeys(readers.outputs):
        assert any(content.startswith(output) and len(output) in ends for content, ends in files)


def stored(path: Path) -> Store:
    store = Store.open(str(path), 1000, 10, log)
    store.append(row(1), [message_id(1)])
    return store


@pytest.mark.parametrize("stopped", [True, False])
def test_what_is_not_committed_is_not_read(tmp_path: Path, stopped: bool) -> None:
    """The reader needs no consumer."""
    path = tmp_path / "data.csv"
    store = stored(path)
    if stopped:
        store.close()
    with path.open("ab") as file:
        file.write(row(2) + row(3)[:9])
    assert committed(path) == CSV_HEADER + row(1)


def test_the_file_for_readers_is_one_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    stored(path).close()
    text = (tmp_path / "data.csv.committed").read_bytes()
    record = json.loads(text)
    assert text.count(b"\n") == 1
    assert record["inode"] == path.stat().st_ino
    assert record["committed_bytes"] == path.stat().st_size
    assert record["crc32"] == zlib.crc32(text.partition(b', "crc32"')[0])


@pytest.mark.parametrize("harm", ["missing", "torn", "of another file", "of a truncated file"])
def test_without_its_mark_a_reader_waits_for_the_consumer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """After a while it is refused with one line. A start writes the mark."""
    monkeypatch.setattr(reader, "_PATIENCE_SECONDS", 0.1)
    path, mark = tmp_path / "data.csv", tmp_path / "data.csv.committed"
    store = stored(path)
    store.close()
    if harm == "missing":
        mark.unlink()
    elif harm == "torn":
        mark.write_bytes(mark.read_bytes().replace(b"1", b"2"))
    elif harm == "of another file":  # copied with its folder, as from a backup
        shutil.copy(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    else:
        os.truncate(path, len(CSV_HEADER) + 10)
    with pytest.raises(StartupError, match=r"data.csv: .*; start the consumer, or read the file itself$"):
        committed(path)
    Store.open(str(path), 1000, 10, log).close()
    assert committed(path) == CSV_HEADER + (b"" if harm == "of a truncated file" else row(1))


@pytest.mark.parametrize("there", ["nothing", "a CSV alone", "a folder", "a fifo", "a journal without its CSV"])
def test_a_csv_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    monkeypatch.setattr(reader, "_PATIENCE_SECONDS", 0.1)
    path = tmp_path / "data.csv"
    if there == "a CSV alone":
        path.write_bytes(CSV_HEADER + row(1))
    elif there == "a folder":
        path.mkdir()
    elif there == "a fifo":
        os.mkfifo(path)
    elif there == "a journal without its CSV":
        stored(path).close()
        path.unlink()
    with pytest.raises(StartupError, match=str(path)) as caught:
        committed(path)
    assert "\n" not in str(caught.value)
