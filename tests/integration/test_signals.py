"""Signals to real processes, at moments when there is no handler yet or no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Service, Start
from tests.support.polling import wait_until


def ignores_sighup(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored, 16) >> (signal.SIGHUP - 1) & 1)


def with_children(pid: int) -> list[int]:
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@contextlib.contextmanager
def storm(service: Service) -> Iterator[None]:
    """SIGHUP for the process and its workers, again and again."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.002):
            with contextlib.suppress(OSError):  # it has ended
                for pid in with_children(service.process.pid):
                    os.kill(pid, signal.SIGHUP)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("producer", {}),
        ("producer", {"WORKERS": 2}),
        ("consumer", {}),
        ("consumer", {"PARTITIONS": 2}),
    ],
    ids=str,
)
def test_sighup_never_ends_a_process(name: str, settings: dict[str, int], producer: Start, consumer: Start) -> None:
    """This is from the first import to the exit code. The interpreter's own start, about 20 ms, is not ours."""
    service = (producer if name == "producer" else consumer)(wait=False, **settings)
    wait_until("it ignores SIGHUP", lambda: ignores_sighup(service.process.pid), explain=service.log)
    with storm(service):
        service.wait_until_ready()
        assert service.stop() == 0, service.log()
    assert "error" not in service.log()


def test_a_second_interrupt_ends_workers_at_once(producer: Start, nobodys_port: int) -> None:
    """The first begins a stop that lasts as long as its drain delay."""
    service = producer(wait=False, WORKERS=2, DRAIN_DELAY_MS=60_000, AMQP_URL=f"amqp://127.0.0.1:{nobodys_port}/")
    wait_until("both listen", lambda: service.log().count("POST to") == 2, explain=service.log)
    service.process.send_signal(signal.SIGINT)
    wait_until("both stop", lambda: service.log().count("stopping") == 2, explain=service.log)
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(10) == 1


MAKE_RUN = """
import subprocess, sys
from scripts import run
stubborn = sys.argv[1]
def child(name):
    wait = "trap '' TERM; echo up; while :; do sleep 0.1; done" if name == stubborn else "exec sleep 60"
    return subprocess.Popen(["bash", "-c", wait], start_new_session=True)
class Broker:
    url = "amqp://"
    def start(self):
        self.process = child("broker")
    def stop(self):
        run.say("stopping the broker")
        self.process.terminate()
        self.process.wait()
def watch(*processes, watch=run.watch):
    run.say("watching")
    return watch(*processes)
run.choose_broker, run.spawn, run.watch = Broker, lambda name, environment: child(name), watch
sys.exit(run.main())
"""


@pytest.mark.parametrize("stubborn", ["producer", "broker"])
def test_make_run_ends_at_once_on_a_second_interrupt(stubborn: str, tmp_path: Path) -> None:
    """Whatever does not stop is then killed, at any moment of the stop, and no traceback is shown."""
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", MAKE_RUN, stubborn]
        run = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait_until("it runs", lambda: {"up", "watching"} <= set(log.read_text().split()), explain=log.read_text)
        run.send_signal(signal.SIGINT)
        said = "stopping the broker" if stubborn == "broker" else "Stopping"
        wait_until("it stops", lambda: said in log.read_text(), explain=log.read_text)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        run.kill()
