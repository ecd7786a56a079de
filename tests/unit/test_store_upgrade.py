"""The files of predlog 1.0.0 (data/1.0.0, written by its code) are read. Those of a newer version are refused."""

from __future__ import annotations

import json
import logging
import shutil
import time
import zlib
from pathlib import Path

import pytest

from common.errors import StartupError
from common.event.rows import CSV_HEADER
from common.storage.reader import Mark, MarkFile
from common.storage.records import VERSION
from common.storage.store import Store
from tests.unit.test_store import append, asides, crash, ids, row, rows

DATA = Path(__file__).parent / "data" / "1.0.0"
log = logging.getLogger(__name__)


def put(kind: str, folder: Path) -> Path:
    """Copy the files of a run of 1.0.0, and tell the journal their inode, as if they had been written here."""
    shutil.copytree(DATA / kind, folder)
    path = folder / "data.csv"
    for name in ("data.csv.journal", "data.csv.journal.mark"):
        lines = []
        for line in (folder / name).read_bytes().splitlines():
            record = json.loads(line.partition(b" ")[2])
            record["file"]["inode"] = path.stat().st_ino
            if "device" in record["file"]:
                record["file"]["device"] = path.stat().st_dev
            lines.append(with_checksum(json.dumps(record).encode()))
        (folder / name).write_bytes(b"".join(lines))
    return path


def with_checksum(text: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(text), text)


def open_store(path: Path) -> Store:
    return Store.open(str(path), 100, 10, log)


@pytest.mark.parametrize("kind", ["clean", "crashed"])
def test_what_1_0_0_left_is_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Nothing is lost, and nothing is duplicated when the broker delivers everything again."""
    path = put(kind, tmp_path / kind)
    store = open_store(path)
    assert "corrupt" not in caplog.text
    assert "without a journal" not in caplog.text
    again = [number for number in range(1, 8) if not store.seen(*ids(number))]
    assert again == [5, 6, 7]  # 3 had no rows
    append(store, *again)
    assert path.read_bytes() == CSV_HEADER + rows(1, 2, 4, 5, 6, 7)
    assert asides(path.parent) == ([row(5) + row(6)[:20]] if kind == "crashed" else [])
    assert store.period_due(3600)
    assert sorted(file.name for file in path.parent.iterdir() if ".uncommitted-" not in file.name) == [
        "data.csv",
        "data.csv.committed",
        "data.csv.journal",
    ]
    crash(store)
    assert open_store(path).seen(*ids(7))


def test_what_1_0_0_left_after_a_downgrade_is_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The mark of the 2.0 before is still there. It knows of no later commit, although 1.0.0 has no generations."""
    path = put("crashed", tmp_path / "crashed")
    inode = path.stat().st_ino
    MarkFile(str(path)).write(Mark(inode, len(CSV_HEADER), time.time_ns()))
    store = open_store(path)
    assert "corrupt" not in caplog.text
    assert asides(path.parent) == [row(5) + row(6)[:20]]
    assert store.seen(*ids(4))


def test_a_journal_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    store = open_store(path)
    append(store, 1)
    store.close()
    journal = path.with_name("data.csv.journal")
    record = json.loads(journal.read_bytes().splitlines()[0].partition(b" ")[2])
    assert record["version"] == VERSION
    newer = with_checksum(json.dumps({"version": VERSION + 1, "who": "knows"}).encode()) + b"and what\n"
    journal.write_bytes(newer)
    content = path.read_bytes()
    with pytest.raises(
        StartupError, match=rf"data.csv.journal: its format {VERSION + 1} is that of a newer predlog"
    ) as caught:
        open_store(path)
    assert "\n" not in str(caught.value)
    assert (journal.read_bytes(), path.read_bytes()) == (newer, content)
