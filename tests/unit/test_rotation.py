"""Rotated files: when one is due, their names and their number."""

from __future__ import annotations

import fnmatch
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.storage import rotation
from common.storage.rotation import new_name, period_due, remove_oldest, rotated_files
from common.storage.store import Store
from tests.support.polling import wait_until
from tests.unit.test_store import append, log

HOUR, DAY = 3600, 86_400


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("first_row", "now", "interval", "due"),
    [
        ("2026-11-28T23:59:59.9", "2026-11-29T00:00:00", DAY, True),
        ("2026-11-29T00:00:00", "2026-11-29T23:59:59.9", DAY, False),
        ("2026-11-29T10:59:59", "2026-11-29T11:00:00", HOUR, True),
        ("2026-11-29T10:00:00", "2026-11-29T10:59:59", HOUR, False),
        ("2026-11-29T10:59:59", "2026-12-24T10:59:59", HOUR, True),
        ("2026-11-29T20:59:59", "2026-11-29T21:00:00", 7 * HOUR, True),  # 00, 07, 14, 21
        ("2026-11-29T21:00:00", "2026-11-29T23:59:59", 7 * HOUR, False),
        ("2026-11-29T23:59:59", "2026-11-30T00:00:00", 7 * HOUR, True),
        ("2026-11-25T23:59:59", "2026-11-26T00:00:00", 7 * DAY, True),  # a Thursday, as 1970-01-01
        ("2026-11-26T00:00:00", "2026-12-02T23:59:59", 7 * DAY, False),
    ],
)
def test_a_period_begins_at_multiples_since_utc_midnight(first_row: str, now: str, interval: int, due: bool) -> None:
    assert period_due(at(first_row), at(now), interval) is due


@pytest.mark.parametrize("set_back_seconds", [1, HOUR, 30 * HOUR, 400 * DAY])
def test_a_clock_set_back_neither_stops_nor_repeats_rotation(set_back_seconds: int) -> None:
    """At most one file is begun because of it, and the next one is begun two intervals later at the latest."""
    first_row = now = at("2026-11-29T00:00:01")
    now -= set_back_seconds
    rotated_at = []
    for second in range(0, 3 * DAY, 60):
        if period_due(first_row, now + second, HOUR):
            first_row = now + second
            rotated_at.append(second)
    pauses = [later - earlier for earlier, later in zip([0, *rotated_at], [*rotated_at, 3 * DAY], strict=True)]
    assert max(pauses) <= 2 * HOUR + 60
    assert sum(pause < HOUR for pause in pauses) <= 3


def test_names_are_in_order_of_rotation_whatever_the_clock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = str(tmp_path / "data.csv")
    names: list[str] = []
    for second in [10, 10, 11, 5, 5, *[11] * 9, 12]:
        monkeypatch.setattr(rotation, "utc_now", lambda second=second: f"20260101T0000{second:02}Z")
        name = new_name(csv)
        suffix = ".gz" if len(names) % 3 else ""
        Path(name + suffix).touch()
        names.append(name + suffix)
    assert [file.path for file in rotated_files(csv)] == names
    assert len(set(names)) == len(names)
    assert names[3].endswith("data-20260101T000011Z-1.csv")


def test_only_the_oldest_rotated_files_are_removed(tmp_path: Path) -> None:
    """It never removes the live file, one that was set aside, or one of another CSV."""
    stay = [
        "data.csv",
        "data-20260103T000000Z-2.csv.gz",
        "data-20260103T000000Z-10.csv",
        "data-20260103T000000Z-10.csv.gz",
        "data-mine.csv",
        "data.2-20260101T000000Z.csv",
        "data.csv.uncommitted-20260101T000000Z",
        "data.csv.journal.corrupt-20260101T000000Z",
    ]
    go = ["data-20260101T000000Z.csv", "data-20260102T000000Z.csv.gz", "data-20260103T000000Z.csv"]
    for name in stay + go:
        (tmp_path / name).touch()
    removed = remove_oldest(str(tmp_path / "data.csv"), 2)
    assert sorted(map(os.path.basename, removed)) == sorted(go)
    assert sorted(os.listdir(tmp_path)) == sorted(stay)


def test_a_store_keeps_the_latest_rotated_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It does so after each rotation, and at a start."""

    def kept() -> list[str]:
        return sorted(map(str, tmp_path.glob("data-*.csv*")))

    caplog.set_level(logging.INFO)
    store = Store.open(str(tmp_path / "data.csv"), 100, 10, log)
    rotated = []
    for number in range(4):
        append(store, number)
        rotated.append(str(store.rotate()))
    store.close()
    store = Store.open(str(tmp_path / "data.csv"), 100, 10, log, rotate_keep=3)
    removed = f"{rotated[0]}: removed, since only the latest 3 rotated files are kept"
    wait_until("the oldest one is removed", lambda: removed in caplog.text)
    assert kept() == sorted(rotated[1:])
    append(store, 9)
    rotated.append(str(store.rotate()))
    wait_until("the next one is removed", lambda: kept() == sorted(rotated[2:]))
    store.close()


def test_one_glob_finds_the_rotated_files_and_no_other() -> None:
    stem = ["data-20260101T000000Z.csv", "data-20260101T000000Z-1.csv.gz", "data.2-20260101T000000Z.csv"]
    other = ["", ".lock", ".journal", ".journal.new", ".committed", ".gz.part", ".uncommitted-20260101T000000Z.part"]
    names = [*stem, *(f"{csv}{end}" for csv in ("data.csv", "data.2.csv") for end in other)]
    names += [f"data.csv{end}-20260101T000000Z" for end in (".uncommitted", ".journal.corrupt")]
    assert fnmatch.filter(names, "data*-*.csv*") == stem
    assert fnmatch.filter(names, "data-*.csv*") == stem[:2]


def test_what_another_consumer_compresses_is_left_to_it(tmp_path: Path) -> None:
    """A consumer that has just given up its lock can still be at work."""
    csv, its_part = tmp_path / "data.csv", tmp_path / "data.csv.abc.gz.part"
    (tmp_path / "data-20261129T000000Z.csv").write_text("rows")
    its_part.write_text("half")
    rotation.tend(str(csv), 0, True, log)
    assert its_part.read_text() == "half"
    assert sorted(os.listdir(tmp_path)) == ["data-20261129T000000Z.csv.gz", "data.csv.abc.gz.part"]
