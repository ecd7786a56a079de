"""`consumer.py --read`, and the command line around the commands."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.event.rows import CSV_HEADER
from common.storage.store import Store
from tests.conftest import ROOT


def run(csv_file: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "consumer.py"), *flags]
    environment = {"PATH": os.environ["PATH"], "CSV_FILE": str(csv_file), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def store(csv_file: Path, *rows: bytes) -> None:
    opened = Store.open(str(csv_file), 1000, 10, logging.getLogger("test"))
    opened.append(b"".join(rows), [])
    opened.close()


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    return tmp_path / "data.csv"


def test_read_writes_the_committed_rows(csv_file: Path) -> None:
    store(csv_file, b"a;b\r\n", b"c;d\r\n")
    done = run(csv_file, "--read")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == CSV_HEADER.decode().replace("\r", "") + "a;b\nc;d\n"


def test_read_of_all_partitions_has_one_header(tmp_path: Path, csv_file: Path) -> None:
    for partition in range(3):
        store(tmp_path / f"data.{partition}.csv", b"row %d\r\n" % partition)
    header, *rows = run(csv_file, "--read", PARTITIONS="3").stdout.splitlines()
    assert header.encode() + b"\r\n" == CSV_HEADER
    assert rows == ["row 0", "row 1", "row 2"]
    assert run(csv_file, "--read", "--partition", "2", PARTITIONS="3").stdout.splitlines()[1:] == ["row 2"]


def test_read_without_a_csv_is_one_line(csv_file: Path) -> None:
    done = run(csv_file, "--read")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"consumer: {csv_file}: No such file or directory\n"


def test_a_reader_that_has_enough_ends_read_quietly(csv_file: Path) -> None:
    store(csv_file, *[b"x" * 1000 + b"\r\n"] * 2000)
    command = f"{sys.executable} {ROOT}/consumer.py --read | head -n 1"
    environment = {"PATH": os.environ["PATH"], "CSV_FILE": str(csv_file)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (CSV_HEADER, b"")


def test_two_commands_at_once_are_refused(csv_file: Path) -> None:
    done = run(csv_file, "--read", "--dead-letters")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr
