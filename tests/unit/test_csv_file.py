"""The CSV file: where its rows end, how bytes are set aside, how an old file is compressed."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.storage.csv_file import CsvFile, rows_end
from common.storage.files import free_name, make_directory
from common.storage.rotation import compress

cells = st.text(st.sampled_from('a;,"\r\n é'), max_size=5)


def encode(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=";").writerows(rows)
    return text.getvalue().encode()


@given(st.lists(st.lists(cells, min_size=2, max_size=3), max_size=6), st.data())
def test_a_torn_file_ends_after_its_last_whole_row(rows: list[list[str]], data: st.DataObject) -> None:
    """It is torn at any byte."""
    ends = [len(encode(rows[:count])) for count in range(len(rows) + 1)]
    whole = encode(rows)
    torn = whole[: data.draw(st.integers(0, len(whole)), "length")]
    assert rows_end(io.BytesIO(torn)) == max(end for end in ends if end <= len(torn))


def test_the_end_of_rows_is_found_in_linear_time() -> None:
    """That holds even when a quote is never closed."""
    lines = b"a;b\r\n" * 200_000
    assert rows_end(io.BytesIO(lines + b'"' + lines)) == len(lines)


def test_short_writes_are_continued_until_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CsvFile(str(tmp_path / "data.csv"))
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    file.write(b"0123456789")
    file.close()
    assert (tmp_path / "data.csv").read_bytes() == b"0123456789"


def test_bytes_set_aside_move_to_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"keep" + b"x" * 3_000_000)
    file = CsvFile(str(path))
    aside = [file.set_aside(2_000_000), file.set_aside(4)]
    file.close()
    assert path.read_bytes() == b"keep"
    assert [os.path.getsize(name) for name in aside] == [1_000_004, 1_999_996]


def test_nothing_is_cut_when_setting_aside_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"keep this")
    file = CsvFile(str(path))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.set_aside(4)
    file.close()
    assert path.read_bytes() == b"keep this"
    assert os.listdir(tmp_path) == ["data.csv"]


def test_a_second_consumer_cannot_open_the_file(tmp_path: Path) -> None:
    """That holds even without a lock file."""
    path = str(tmp_path / "data.csv")
    file = CsvFile(path)
    with pytest.raises(OSError, match="is in use by another consumer"):
        CsvFile(path)
    file.close()
    CsvFile(path).close()


@pytest.mark.parametrize("special", ["/dev/null", "/dev/full"])
def test_a_device_is_refused(special: str) -> None:
    with pytest.raises(OSError, match="is not a regular file"):
        CsvFile(special)


def test_a_file_is_in_place_until_its_path_names_another(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    file = CsvFile(str(path))
    assert file.is_at(str(path))
    path.rename(tmp_path / "old")
    assert not file.is_at(str(path))
    path.touch()
    assert not file.is_at(str(path))
    file.close()


def test_a_free_name_is_never_taken(tmp_path: Path) -> None:
    names = []
    for _ in range(6):
        names.append(free_name(f"{tmp_path}/data.csv.uncommitted-"))
        Path(names[-1]).touch()
    assert len(set(names)) == 6


def test_a_compressed_file_replaces_the_plain_one(tmp_path: Path) -> None:
    path, part = tmp_path / "data-1.csv", str(tmp_path / "data.csv.gz.part")
    path.write_bytes(content := b"a;b\r\n" * 500_000)
    compress(str(path), part)
    assert os.listdir(tmp_path) == ["data-1.csv.gz"]
    assert gzip.decompress((tmp_path / "data-1.csv.gz").read_bytes()) == content


@pytest.mark.parametrize("step", ["fsync", "rename", "unlink"])
def test_compression_that_dies_at_any_step_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """There is a whole file after each step."""
    path, part = tmp_path / "data-1.csv", str(tmp_path / "data.csv.gz.part")
    packed = tmp_path / "data-1.csv.gz"
    path.write_bytes(content := b"a;b\r\n" * 1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(str(path), part)
    assert path.read_bytes() == content
    assert not packed.exists() or gzip.decompress(packed.read_bytes()) == content
    compress(str(path), part)
    assert os.listdir(tmp_path) == ["data-1.csv.gz"]
    assert gzip.decompress(packed.read_bytes()) == content


def test_folders_are_made_up_to_the_root(tmp_path: Path) -> None:
    """An existing folder is fine."""
    make_directory(str(tmp_path / "a" / "b" / "c"))
    make_directory(str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_bytes_set_aside_are_on_the_disk_before_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is synced whole, then its name, and only then is the CSV cut."""
    path = tmp_path / "data.csv"
    path.write_bytes(b"keep this")
    file = CsvFile(str(path))
    steps = []
    fsync, ftruncate = os.fsync, os.ftruncate

    def synced(fd: int) -> None:
        fsync(fd)
        steps.append(f"synced {os.readlink(f'/proc/self/fd/{fd}').rpartition('.')[2]} {os.fstat(fd).st_size}")

    def cut(fd: int, length: int) -> None:
        ftruncate(fd, length)
        steps.append(f"cut at {length}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "ftruncate", cut)
    file.set_aside(4)
    file.close()
    assert steps[0] == "synced part 5"
    assert steps[1].startswith(f"synced {tmp_path}")
    assert steps[2] == "cut at 4"
