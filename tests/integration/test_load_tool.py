"""The load tool as a user runs it: it drives both processes, and its verdict on the CSV can be trusted."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, Service, Start


def load(producer: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.load", "--url", producer.url, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_accepted_event_is_verified_and_logged(producer: Start, consumer: Start, tmp_path: Path) -> None:
    """Every accepted event is verified and every answer logged."""
    csv, log = consumer().csv_file, tmp_path / "answers.jsonl"
    arguments = ("--events", "2000", "--retries", "--verify", str(csv), "--log", str(log))
    done = load(producer(), *arguments)
    assert done.returncode == 0, done.stderr
    assert "2,000 events answered 200" in done.stderr
    assert "lost 0, doubled 0, torn 0" in done.stderr
    answers = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(answers) >= 2000
    assert {answer["status"] for answer in answers} == {200}


def test_rows_that_are_missing_are_reported(producer: Start, consumer: Start) -> None:
    consumer()
    done = load(producer(), "--events", "200", "--verify", "/another/place/data.csv")
    assert done.returncode == 1
    assert "lost 1" in done.stderr


def test_large_frames_and_pipelining_go_through(producer: Start, consumer: Start) -> None:
    csv = consumer().csv_file
    done = load(producer(), "--events", "100", "--frames", "5x20KB", "--pipeline", "8", "--verify", str(csv))
    assert done.returncode == 0, done.stderr


def test_a_producer_that_is_not_there_is_one_line(nobodys_port: int) -> None:
    command = [sys.executable, "-m", "scripts.load", "--url", f"http://127.0.0.1:{nobodys_port}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is the producer running?" in done.stderr
    assert "Traceback" not in done.stderr
