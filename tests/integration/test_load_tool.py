"""The load tool as a user runs it: it drives both processes, and its verdict on the CSV is right."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import ROOT, Service, Start


def load(producer: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.load", "--url", producer.url, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_simultaneous_runs_are_verified_separately(producer: Start, consumer: Start, tmp_path: Path) -> None:
    """Every accepted event is verified, small or large; every answer is logged; a lost row is reported."""
    target, csv, log = producer(), consumer().csv_file, tmp_path / "answers.jsonl"
    runs = (
        ("--events", "2000", "--retries", "--verify", str(csv), "--log", str(log)),
        ("--events", "100", "--frames", "5x20KB", "--pipeline", "8", "--verify", str(csv)),
        ("--events", "200", "--verify", "/another/place/data.csv"),
    )
    with ThreadPoolExecutor() as threads:
        done, large, missing = threads.map(lambda arguments: load(target, *arguments), runs)
    assert large.returncode == 0, large.stderr
    assert missing.returncode == 1
    assert "lost 1" in missing.stderr
    assert done.returncode == 0, done.stderr
    assert "2,000 events answered 200" in done.stderr
    assert "lost 0, duplicated 0, torn 0" in done.stderr
    answers = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(answers) >= 2000
    assert {answer["status"] for answer in answers} == {200}


def test_a_producer_that_is_not_running_is_one_line(nobodys_port: int) -> None:
    command = [sys.executable, "-m", "scripts.load", "--url", f"http://127.0.0.1:{nobodys_port}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "is the producer running?" in done.stderr
    assert "Traceback" not in done.stderr
