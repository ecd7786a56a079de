"""Where measurements happen: the broker, a scratch folder, how much to measure, and the programs side by side."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import load
from tests.bench.bare_amqp import BareConnection, blobs
from tests.bench.events import Load
from tests.bench.process import Process
from tests.bench.results import BASELINE, BRIDGE, BRIDGE_TUNED, FLOOR, PREDLOG, SINGLE

PROGRAMS: dict[str, dict[str, tuple[str, ...]]] = {
    PREDLOG: {"producer": ("producer.py",), "consumer": ("consumer.py",)},
    SINGLE: {"producer": ("producer.py",), "consumer": ("consumer.py",)},
    BASELINE: {
        "producer": ("-m", "tests.bench.baseline_producer"),
        "consumer": ("-m", "tests.bench.baseline_consumer"),
    },
    BRIDGE: {"producer": ("-m", "tests.bench.baseline_bridge")},
    BRIDGE_TUNED: {"producer": ("-m", "tests.bench.baseline_bridge", "tuned")},
    FLOOR: {"producer": ("-m", "tests.bench.floor_producer")},
}
SETTINGS = {SINGLE: {"EVENTS_PER_MESSAGE": "1"}, BASELINE: {"PREFETCH_COUNT": "2000"}}
SUBJECTS = (PREDLOG, BASELINE)
BRIDGES = (BRIDGE, BRIDGE_TUNED) if importlib.util.find_spec("mq_bridge") else ()


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure. `drain_seconds`: how long the drain of a backlog should take, about."""

    rounds: int = 3
    seconds: int = 3
    drain_seconds: float = 2.0
    idle_connections: int = 10_000


QUICK = Effort(rounds=1, seconds=2, drain_seconds=0.5, idle_connections=1_000)


@dataclass(frozen=True, slots=True)
class Producer:
    """A running, ready producer."""

    process: Process
    port: int
    queue: str


@dataclass(frozen=True, slots=True)
class Consumer:
    """A running consumer."""

    process: Process
    health_port: int

    def fsyncs(self) -> float:
        """How often it has synced its file so far, by its own metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/metrics", timeout=5) as answer:
            found = re.search(rb"^predlog_fsync_seconds_count (\d+)", answer.read(), re.MULTILINE)
        if found is None:
            raise RuntimeError("the consumer's metrics have no predlog_fsync_seconds_count")
        return int(found[1])


@dataclass(frozen=True, slots=True)
class Stage:
    """`control` runs rabbitmqctl with the given words; `broker_cpu_seconds` is user + sys of the broker so far."""

    amqp_url: str
    control: Callable[..., object]
    broker_cpu_seconds: Callable[[], float]
    folder: Path
    effort: Effort

    @contextlib.contextmanager
    def producer(self, subject: str, queue: str, **given: str) -> Iterator[Producer]:
        port = free_port()
        settings = {"AMQP_URL": self.amqp_url, "QUEUE_NAME": queue, "HTTP_PORT": str(port)}
        settings |= SETTINGS.get(subject, {}) | given
        command = (sys.executable, *PROGRAMS[subject]["producer"])
        with Process(command, settings, self.folder / "producer.log") as process:
            process.wait_until_ready(port)
            yield Producer(process, port, queue)

    @contextlib.contextmanager
    def consumer(self, subject: str, queue: str, csv_file: Path, **given: str) -> Iterator[Consumer]:
        """A consumer that was just started on `csv_file`."""
        port = free_port()
        settings = {
            "AMQP_URL": self.amqp_url,
            "QUEUE_NAME": queue,
            "CSV_FILE": str(csv_file),
            "HEALTH_PORT": str(port),
        }
        settings |= SETTINGS.get(subject, {}) | given
        command = (sys.executable, *PROGRAMS[subject]["consumer"])
        with Process(command, settings, self.folder / "consumer.log") as process:
            yield Consumer(process, port)

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
        """Wait until `process` consumes from the queue."""
        deadline = time.monotonic() + timeout_seconds
        with BareConnection(self.amqp_url) as connection:
            while connection.counts(queue)[1] == 0:
                process.check()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no consumer after {timeout_seconds:.0f} s:\n{process.log_tail()}")
                time.sleep(0.05)

    def fill(self, queue: str, messages: Load, count: int) -> None:
        """Publish `count` events, one per message."""
        with BareConnection(self.amqp_url) as connection:
            connection.publish(blobs(queue, messages.bodies, count, connection.frame_max), count)

    def fill_by_posting(self, queue: str, messages: Load, count: int) -> None:
        """POST `count` events to a predlog producer on 256 connections, so that they share messages as under load."""
        with self.producer(PREDLOG, queue) as running:
            answers = load.drive(running.port, messages.bodies, 256, count=count)
        refused = [answer for answer in answers if answer.status != 200]
        if refused:
            raise RuntimeError(f"{len(refused):,} of {count:,} events were refused, the first with {refused[0].status}")


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
