"""Every CSV of a new number of partitions knows what is stored."""

import logging
from pathlib import Path

import pytest

from common.storage.lock import Lock
from common.storage.store import Store
from scripts.carry_ids import csv_files, latest, main

LOG = logging.getLogger("test")
ROW = b"camera;1;1;1;f;0.5;\r\n"


def ids(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16) for number in numbers]


def store(path: str, *numbers: int) -> None:
    opened = Store.open(path, 100, 10, LOG)
    opened.append(ROW * len(numbers), ids(*numbers))
    opened.close()


def known(path: str, *numbers: int) -> list[bool]:
    opened = Store.open(path, 100, 10, LOG)
    try:
        return [opened.seen(id) for id in ids(*numbers)]
    finally:
        opened.close()


def carry(csv: str, before: int, after: int) -> int:
    return main(["--csv-file", csv, "--from", str(before), "--to", str(after), "--dedup-window", "100"])


def test_what_is_stored_is_known_after_growing_and_shrinking(tmp_path: Path) -> None:
    csv = str(tmp_path / "data.csv")
    store(csv, 1, 2, 3)
    assert carry(csv, 1, 4) == 0
    four = csv_files(csv, 4)
    assert [known(path, 1, 2, 3, 4) for path in four] == [[True, True, True, False]] * 4
    store(four[0], 4)
    store(four[3], 5)
    assert carry(csv, 4, 1) == 0
    assert known(csv, 1, 2, 3, 4, 5, 6) == [True] * 5 + [False]
    assert Path(csv).read_bytes().count(ROW) == 3, "no row moves"


def test_carrying_ids_again_changes_nothing(tmp_path: Path) -> None:
    csv = str(tmp_path / "data.csv")
    store(csv, 1, 2)
    assert carry(csv, 1, 2) == 0
    before = [Path(path).read_bytes() for path in csv_files(csv, 2)]
    assert carry(csv, 1, 2) == 0
    assert [Path(path).read_bytes() for path in csv_files(csv, 2)] == before
    assert known(csv_files(csv, 2)[1], 1, 2) == [True, True]


def test_a_running_consumer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = str(tmp_path / "data.csv")
    store(csv, 1)
    lock = Lock(csv_files(csv, 4)[2])
    assert lock.acquire()
    assert carry(csv, 1, 4) == 1
    assert f"a consumer of {csv_files(csv, 4)[2]} is running: stop all consumers first" in capsys.readouterr().err
    assert not Path(csv_files(csv, 4)[0]).exists()
    lock.release()


@pytest.mark.parametrize("content", [b"", b"garbage", b"garbage\n"])
def test_a_corrupt_journal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    csv = str(tmp_path / "data.csv")
    store(csv, 1)
    Path(f"{csv}.journal").write_bytes(content)
    assert carry(csv, 1, 4) == 1
    assert f"{csv}.journal: no whole line; start the consumer once" in capsys.readouterr().err


def test_nothing_to_carry_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert carry(str(tmp_path / "data.csv"), 4, 1) == 1
    assert "nothing to carry" in capsys.readouterr().err


def test_the_latest_ids_are_the_same_share_of_each_list() -> None:
    assert latest([ids(1, 2, 3, 4), ids(11, 12)], 4) == ids(11, 3, 12, 4)


def test_an_id_of_two_lists_is_carried_once() -> None:
    assert sorted(latest([ids(1, 2), ids(2, 3)], 10)) == ids(1, 2, 3)


def test_a_window_below_the_least_carries_as_many_as_the_consumer_keeps(tmp_path: Path) -> None:
    csv = str(tmp_path / "data.csv")
    store(csv, 1, 2)
    assert main(["--csv-file", csv, "--from", "1", "--to", "2", "--dedup-window", "0"]) == 0
    assert [known(path, 1, 2) for path in csv_files(csv, 2)] == [[True, True]] * 2


def test_a_csv_behind_a_link_is_carried(tmp_path: Path) -> None:
    csv = str(tmp_path / "data.csv")
    first, second = csv_files(csv, 2)
    (tmp_path / "disk").mkdir()
    Path(first).symlink_to(tmp_path / "disk" / "data.0.csv")
    store(first, 1)
    store(second, 2)
    assert carry(csv, 2, 3) == 0
    assert known(csv_files(csv, 3)[2], 1, 2) == [True, True]
