"""Fixtures: a private RabbitMQ for the session, and producer.py and consumer.py as real processes, one call each."""

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from scripts.rabbitmq import free_port
from tests.rabbitmq import RabbitMQ
from tests.support.child import WITH_US
from tests.support.polling import pause_seconds

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_SECONDS = 45.0

settings.register_profile("default", deadline=None)
settings.register_profile("fuzz", deadline=None, max_examples=20_000)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """Let no garbage collection look at what was imported: that is a million objects, and nearly a quarter second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """As it was: nanobind reports what stays frozen at the end as leaked."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured (`record_property`), since the output of parallel tests is not shown."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def nobodys_port() -> Iterator[int]:
    """A port where no process listens, now or later."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


class Service:
    """A running producer.py or consumer.py: where it is, what it said, and ways to end it."""

    def __init__(self, name: str, url: str, environment: dict[str, str], directory: Path) -> None:
        """Start it; see `wait_until_ready`."""
        self.name = name
        self.url = url
        self.csv_file = Path(environment.get("CSV_FILE", ""))
        self._log_path = directory / f"{name}-{uuid.uuid4().hex[:8]}.log"
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*WITH_US, sys.executable, ROOT / f"{name}.py"],
                env={"PATH": os.environ["PATH"], "HOME": str(directory), "PYTHONUNBUFFERED": "1", **environment},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self) -> str:
        """Return all that it has printed."""
        return self._log_path.read_text()

    def is_ready(self) -> bool:
        """Return whether /readyz is 200 and names no partition as down."""
        try:
            return self.not_ready() == ""
        except OSError:
            return False

    def not_ready(self) -> str:
        """Return why all partitions or some are not ready, as /readyz says; "" if all are."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=20) as answer:
                return str(json.load(answer).get("down", ""))
        except urllib.error.HTTPError as refusal:
            with refusal:
                return str(json.load(refusal)["detail"])
        except (urllib.error.URLError, ConnectionError):  # the latter: cut off in the queue of a listener that closes
            return "it does not listen"

    def metric(self, sample: str) -> float:
        """Return the value of a sample, such as `predlog_rows_total`, from /metrics. `sample` includes labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as page:
            lines = page.read().decode().splitlines()
        values = [line.removeprefix(f"{sample} ") for line in lines if line.startswith(f"{sample} ")]
        assert len(values) == 1, f"{self.name} has {len(values)} of {sample}"
        return float(values[0])

    def wait_until_ready(self, timeout_seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Poll /readyz; fail the test with the log when the process ends or the time is over."""
        began = time.monotonic()
        while not self.is_ready():
            if self.process.poll() is not None:
                pytest.fail(f"{self.name} ended with {self.process.returncode}:\n{self.log()}")
            if time.monotonic() > began + timeout_seconds:
                pytest.fail(f"{self.name} is not ready after {timeout_seconds:.0f} s:\n{self.log()}")
            time.sleep(pause_seconds(began))

    def stop(self, timeout_seconds: float = 20.0) -> int:
        """Send SIGTERM; return the exit code once it has drained."""
        self.process.terminate()
        return self.process.wait(timeout_seconds)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.wait()


Start = Callable[..., Service]
"""`producer(wait=True, **settings)`: settings are environment variables. With wait=False it need not be ready yet."""


@pytest.fixture(scope="session")
def broker() -> Iterator[RabbitMQ]:
    """A RabbitMQ for all tests that do it no harm. A test that kills or fills one starts its own."""
    with tempfile.TemporaryDirectory(prefix="predlog-") as directory:
        node = RabbitMQ(Path(directory))
        node.offer_tls()
        node.start()
        yield node
        node.kill()  # nobody needs its data
        node.stop()


@pytest.fixture
def node(broker: RabbitMQ) -> Iterator[RabbitMQ]:
    """The session's broker, for tests that kill or freeze it. The next test gets it running, whatever this one does."""
    yield broker
    broker.resume()
    broker.start()


@pytest.fixture
def queue_name() -> str:
    """A queue that no other test uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Start]:
    """`start_service(name, url, wait, **settings)`; all are stopped at the end of the test."""
    started: list[Service] = []

    def start(name: str, url: str, wait: bool, **environment: str) -> Service:
        service = Service(name, url, environment, tmp_path)
        started.append(service)
        if wait:
            service.wait_until_ready()
        return service

    yield start
    for service in started:
        service.process.terminate()
    for service in started:
        try:
            service.process.wait(20)
        except subprocess.TimeoutExpired:
            service.kill()
            pytest.fail(f"{service.name} did not stop:\n{service.log()}")


@pytest.fixture
def producer(request: pytest.FixtureRequest, queue_name: str, start_service: Start) -> Start:
    """Start a producer on a free port and the test's own queue. Without AMQP_URL it gets the session's broker."""

    def start(wait: bool = True, **settings: object) -> Service:
        port = settings.pop("HTTP_PORT", None) or free_port()
        environment = _environment(request, settings, QUEUE_NAME=queue_name, HTTP_PORT=port)
        return start_service("producer", f"http://127.0.0.1:{port}", wait, **environment)

    return start


@pytest.fixture
def consumer(request: pytest.FixtureRequest, queue_name: str, tmp_path: Path, start_service: Start) -> Start:
    """Start a consumer of the test's own queue, its CSV in tmp_path. Started again, it continues with the same CSV."""

    def start(wait: bool = True, **settings: object) -> Service:
        port = settings.pop("HEALTH_PORT", None) or free_port()
        csv_file = tmp_path / "data.csv"
        environment = _environment(request, settings, QUEUE_NAME=queue_name, HEALTH_PORT=port, CSV_FILE=csv_file)
        return start_service("consumer", f"http://127.0.0.1:{port}", wait, **environment)

    return start


def _environment(request: pytest.FixtureRequest, settings: dict[str, object], **defaults: object) -> dict[str, str]:
    environment = {name: str(value) for name, value in (defaults | settings).items()}
    if not environment.keys() & {"AMQP_URL", "RABBITMQ_HOST"}:
        environment["AMQP_URL"] = request.getfixturevalue("broker").url
    return environment
