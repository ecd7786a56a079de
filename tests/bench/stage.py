"""Where measurements happen: the broker, a scratch folder, how much to measure, and the programs side by side."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.bare_amqp import BareConnection, encode_publishes
from tests.bench.events import Load
from tests.bench.process import Process
from tests.bench.results import BASELINE, PREDLOG

PROGRAMS: dict[str, dict[str, tuple[str, ...]]] = {
    PREDLOG: {"producer": ("producer.py",), "consumer": ("consumer.py",)},
    BASELINE: {
        "producer": ("-m", "tests.bench.baseline_producer"),
        "consumer": ("-m", "tests.bench.baseline_consumer"),
    },
}
SUBJECTS = (PREDLOG, BASELINE)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure."""

    rounds: int = 3
    seconds: int = 4
    drain_messages: int = 150_000
    baseline_drain_messages: int = 20_000
    idle_connections: int = 10_000


QUICK = Effort(rounds=1, seconds=2, drain_messages=20_000, baseline_drain_messages=4_000, idle_connections=1_000)


@dataclass(frozen=True, slots=True)
class Producer:
    """A running, ready producer."""

    process: Process
    port: int
    queue: str


@dataclass(frozen=True, slots=True)
class Stage:
    """`control` runs rabbitmqctl with the given words."""

    amqp_url: str
    control: Callable[..., object]
    folder: Path
    effort: Effort

    @contextlib.contextmanager
    def producer(self, subject: str, queue: str, **settings: str) -> Iterator[Producer]:
        port = free_port()
        settings = {"AMQP_URL": self.amqp_url, "QUEUE_NAME": queue, "HTTP_PORT": str(port)} | settings
        command = (sys.executable, *PROGRAMS[subject]["producer"])
        with Process(command, settings, self.folder / "producer.log") as process:
            process.wait_until_ready(port)
            yield Producer(process, port, queue)

    @contextlib.contextmanager
    def consumer(self, subject: str, queue: str, csv_file: Path) -> Iterator[Process]:
        """A consumer that was just started on `csv_file`."""
        settings = {"AMQP_URL": self.amqp_url, "QUEUE_NAME": queue, "CSV_FILE": str(csv_file), "PREFETCH_COUNT": "2000"}
        command = (sys.executable, *PROGRAMS[subject]["consumer"])
        with Process(command, settings, self.folder / "consumer.log") as process:
            yield process

    @contextlib.contextmanager
    def queue(self, name: str) -> Iterator[str]:
        """A new queue, deleted at the end."""
        with BareConnection(self.amqp_url) as connection:
            connection.declare(name)
        yield name
        with BareConnection(self.amqp_url) as connection:
            connection.delete(name)

    def purge(self, queue: str) -> None:
        with BareConnection(self.amqp_url) as connection:
            connection.purge(queue)

    def wait_for_consumer(self, queue: str, process: Process, timeout_seconds: float = 30) -> None:
        """Returns once `process` consumes from the queue."""
        deadline = time.monotonic() + timeout_seconds
        with BareConnection(self.amqp_url) as connection:
            while connection.counts(queue)[1] == 0:
                process.check()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no consumer after {timeout_seconds:.0f} s:\n{process.log_tail()}")
                time.sleep(0.05)

    def fill(self, queue: str, load: Load, count: int) -> None:
        with BareConnection(self.amqp_url) as connection:
            connection.publish(encode_publishes(queue, load.bodies, count, connection.frame_max), count)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
