"""Everything that a chaos run needs on stage: producer.py and consumers as real processes, a load, and the verdict.

What goes wrong, and when, is decided elsewhere.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from zlib import crc32

import aiormq
import uvloop

from scripts.load.checker import Verdict, check
from scripts.load.client import Target
from scripts.load.events import Events
from scripts.load.generator import Load
from scripts.load.verify import opened
from scripts.rabbitmq import free_port
from tests.rabbitmq import RabbitMQ
from tests.support.child import WITH_US

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 60.0
EMPTY_SECONDS = 120.0
QUIET_SECONDS = 1.5
STOP_SECONDS = 30.0

_SAMPLE = re.compile(r"^(predlog_\w+) (\S+)$", re.MULTILINE)


class StageError(Exception):
    """A failure to end or to come back. The text is one line for a person."""


class Service:
    """producer.py or a consumer: started again under the same address whenever a test wants it."""

    def __init__(self, name: str, command: list[str], port: int, environment: dict[str, str], directory: Path) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = directory / f"{name}.log"
        self._command = [*WITH_US, sys.executable, *command]
        self._environment = {**environment, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        self._counted: Counter[str] = Counter()  # metrics of earlier lives, as far as they were read
        self._latest: Counter[str] = Counter()

    def start(self, **environment: str) -> None:
        """Start it. `environment` is for this life only."""
        self._counted += self._latest
        self._latest = Counter()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env={**self._environment, **environment},
                cwd=self.log_path.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, for `kill`
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code of the last life that ended, or minus the number of a signal."""
        return None if self.process is None else self.process.poll()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """Send SIGKILL, also to its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def workers(self) -> list[int]:
        """The processes that it forked."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self) -> int:
        """Send SIGTERM; return the exit code. Raise StageError if it does not end."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise StageError(f"{self.name} did not stop within {STOP_SECONDS:.0f} s: see {self.log_path}") from None

    def page(self, path: str) -> str | None:
        """Return a page's text if the answer is 200."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=2) as answer:
                return str(answer.read(), "utf-8")
        except urllib.error.HTTPError as refusal:
            refusal.close()
        except OSError:
            pass
        return None

    def is_ready(self) -> bool:
        """Return whether /readyz is 200 and names no partition as down."""
        page = self.page("/readyz")
        return page is not None and '"down"' not in page

    def is_ready_or_raise(self) -> bool:
        """Return whether it is ready; raise StageError if it has ended."""
        if not self.alive:
            raise StageError(f"{self.name} ended on its own with {self.exit_code}: see {self.log_path}")
        return self.is_ready()

    def wait_for_death(self, timeout_seconds: float) -> bool:
        """Return whether it ended in time."""
        assert self.process is not None
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def metrics(self) -> Counter[str]:
        """Return the counters without labels, summed over all lives (for a killed one, as they were last read)."""
        text = self.page("/metrics") if self.alive else None
        if text is not None:
            self._latest = Counter({name: int(float(value)) for name, value in _SAMPLE.findall(text)})
        return self._counted + self._latest

    def gauge(self, name: str) -> int:
        """Return the value that `metrics` read last."""
        return self._latest[name]


class LoadThread:
    """A load in a thread of its own, so that the stage can block."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self.load.run())
        except BaseException as error:
            self._error = error

    def finish(self, *, now: bool, timeout_seconds: float = 90.0) -> None:
        """Wait for its end (with `now`, without any new event), and raise what went wrong in it."""
        if now:
            self.load.stop()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise StageError(f"the load did not end within {timeout_seconds:.0f} s: events wait for an answer")
        if self._error is not None:
            raise self._error


class Stage:
    """Producers, and consumers of queues with a CSV each. Whoever waits polls, and each poll calls `on_poll`.

    The broker is started and stopped by the caller.
    """

    def __init__(
        self,
        directory: Path,
        broker_url: str,
        queues: Mapping[str, Path],
        producers: Sequence[Service],
        consumers: Sequence[Service],
        standbys: Sequence[Service] = (),
    ) -> None:
        """`queues`: the CSV of each. `directory` has the logs."""
        self.queues = queues
        self.producers, self.consumers, self.standbys = list(producers), list(consumers), list(standbys)
        self.on_poll: Callable[[], None] = lambda: None  # called many times a second while the stage waits
        self._broker_url = broker_url
        self._directory = directory

    @property
    def services(self) -> list[Service]:
        return self.producers + self.consumers + self.standbys

    def targets(self) -> list[Target]:
        return [Target.parse(producer.url) for producer in self.producers]

    def wait_until(self, what: str, condition: Callable[[], bool], timeout_seconds: float) -> None:
        """Poll; raise StageError."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                raise StageError(f"not within {timeout_seconds:.0f} s: {what}; the logs are in {self._directory}")
            self.sleep(0.05)

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.on_poll()
            time.sleep(min(left, 0.1))

    def wait_until_ready(self, *services: Service) -> None:
        """Wait for `services`, by default all that serve."""
        for service in services or (*self.producers, *self.consumers):
            self.wait_until(f"{service.name} is ready", service.is_ready_or_raise, READY_SECONDS)

    def ready_messages(self, queue_names: Iterable[str]) -> int:
        """Count the messages that wait, by AMQP, because rabbitmqctl is seconds behind with quorum queues."""

        async def ask() -> int:
            async with asyncio.timeout(10):
                connection = await aiormq.connect(self._broker_url)
                channel = await connection.channel()
                queues = [await channel.queue_declare(name, passive=True) for name in queue_names]
                await connection.close()
                return sum(queue.message_count or 0 for queue in queues)

        return asyncio.run(ask())

    def dead_letters(self) -> int:
        files = [Path(f"{csv}.dead-letters") for csv in self.queues.values()]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def wait_until_stored(self) -> None:
        """Wait until the consumers got nothing for a while and owe no ack, and the broker has no message left."""
        counted, since = -1, time.monotonic()

        def is_quiet() -> bool:
            nonlocal counted, since
            before, counted = counted, sum(each.metrics()["predlog_deliveries_total"] for each in self.consumers)
            idle = all(each.is_ready() and not each.gauge("predlog_unacked") for each in self.consumers)
            if counted != before or not idle:
                since = time.monotonic()
            return time.monotonic() - since > QUIET_SECONDS

        self.wait_until("everything is stored", is_quiet, EMPTY_SECONDS)
        self.wait_until("the queues are empty", lambda: self.ready_messages(self.queues) == 0, EMPTY_SECONDS)

    def verdict(self, events: Events, load: Load) -> Verdict:
        """Judge the CSVs of all queues. A row of another partition's device is foreign."""
        verdict = check(events, load.ledger, chain.from_iterable(map(opened, self.queues.values())))
        for place in self.misplaced(events):
            verdict.foreign.add(place)
        return verdict

    def misplaced(self, events: Events) -> Iterator[str]:
        """Yield each row outside the file of its device's partition: crc32 of the device_id, modulo their number."""
        for index, csv in enumerate(self.queues.values()):
            for name, stream in opened(csv):
                for line in stream:
                    device_id = line[: line.find(b";")]
                    if line.startswith(events.prefix) and crc32(device_id) % len(self.queues) != index:
                        yield f"{name}: {device_id.decode()} is of another partition"

    def kill_all(self) -> None:
        for service in self.services:
            service.kill()


class SingleStage(Stage):
    """One broker, one queue, one producer, up to two consumers of one CSV."""

    def __init__(self, directory: Path, broker: RabbitMQ, queue_name: str = "predictions", **settings: str) -> None:
        """`settings` are environment variables of all processes."""
        self.broker = broker
        self.csv = directory / "data" / "data.csv"
        common = {"AMQP_URL": broker.url + "?heartbeat=2", "QUEUE_NAME": queue_name, **settings}
        self.producer = make_producer("producer", directory, common)
        consumer, standby = (
            make_consumer(name, directory, {**common, "CSV_FILE": str(self.csv)}, ["-m", "tests.chaos.faulty_consumer"])
            for name in ("consumer-a", "consumer-b")
        )
        super().__init__(directory, broker.url, {queue_name: self.csv}, [self.producer], [consumer], [standby])

    @property
    def consumer(self) -> Service:
        return self.consumers[0]

    @property
    def standby(self) -> Service:
        return self.standbys[0]

    def take_over(self) -> None:
        """Make the standby the consumer from now on."""
        self.consumers, self.standbys = self.standbys, self.consumers

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl, with retries: it can fail under load and just after a restart. Raise StageError."""
        for _ in range(3):
            try:
                return self.broker.ctl(*arguments)
            except subprocess.SubprocessError as failure:
                error = failure
                self.sleep(1.0)
        raise StageError(f"rabbitmqctl {arguments[0]} failed three times: {error}")


def make_producer(name: str, directory: Path, environment: dict[str, str]) -> Service:
    port = free_port()
    return Service(name, [str(ROOT / "producer.py")], port, {**environment, "HTTP_PORT": str(port)}, directory)


def make_consumer(name: str, directory: Path, environment: dict[str, str], command: list[str]) -> Service:
    port = free_port()
    return Service(name, command, port, {**environment, "HEALTH_PORT": str(port)}, directory)
