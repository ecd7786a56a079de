"""Which partitions a consumer serves, and their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import ConsumerSettings
from common.consumer.partitions import serve_all, served
from common.errors import SettingError


def settings(**values: object) -> ConsumerSettings:
    return ConsumerSettings(amqp_url="amqp://127.0.0.1:1/", **values)  # type: ignore[arg-type]


def test_one_partition_keeps_the_plain_names() -> None:
    one = settings(csv_file="data/data.csv")
    assert served(one) == {0: one}
    assert served(settings(partition="0")).keys() == {0}


@pytest.mark.parametrize(
    ("text", "numbers"), [("", [0, 1, 2, 3]), ("2", [2]), ("0-2", [0, 1, 2]), ("0,3", [0, 3]), ("3, 1-2,2", [1, 2, 3])]
)
def test_partition_names_those_that_are_served(text: str, numbers: list[int]) -> None:
    by_number = served(settings(partitions=4, partition=text, csv_file="data/my.data.csv", queue_name="q"))
    assert list(by_number) == numbers
    for number, each in by_number.items():
        assert (each.queue_name, each.csv_file) == (f"q.{number}", f"data/my.data.{number}.csv")


@pytest.mark.parametrize("text", ["4", "0-4", "2-1", "-1", "a", "1,,2", "0x1", "1-", "99999999", "²"])
def test_a_partition_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="PARTITION is"):
        served(settings(partitions=4, partition=text))


@pytest.mark.parametrize("path", ["data/", "/dev/null", ".", "/proc/self/fd/1", ".."])
def test_a_csv_file_that_names_no_file_is_refused(path: str) -> None:
    with pytest.raises(SettingError, match="CSV_FILE is"):
        served(settings(partitions=2, csv_file=path))


def test_two_partitions_do_not_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.1.csv").symlink_to(tmp_path / "data.0.csv")
    both = settings(partitions=2, csv_file=str(tmp_path / "data.csv"))
    with pytest.raises(SettingError, match="two partitions would write the same file"):
        serve_all(both, served(both))
