"""`make run`: a broker, producer.py and consumer.py in the foreground, until Ctrl-C or until one of them ends.

The producer is stopped first, so that the consumer can still write what was just accepted; the broker is stopped last.
"""

import atexit
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from types import FrameType

from scripts.rabbitmq import BrokerError, RabbitMQ, free_port, is_installed, orphans_get, speaks_amqp
from scripts.setup import PYTHON, ROOT, apt_install

AMQP_PORT = 5672
NODE_DIRECTORY = Path("data/rabbitmq")
EXAMPLE = json.dumps(json.loads((ROOT / "examples" / "event.json").read_text()), separators=(",", ":"))


class Container:
    """RabbitMQ in a container: with the interface of the private node, its data in a volume."""

    IMAGE = "rabbitmq:4-management"
    NAME = "predlog-rabbitmq"

    def __init__(self) -> None:
        self.port = free_port(AMQP_PORT)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def is_possible() -> bool:
        """Return whether a Docker engine answers."""
        with contextlib.suppress(OSError):
            return subprocess.run(["docker", "version"], capture_output=True).returncode == 0
        return False

    def start(self, timeout_seconds: float = 300.0) -> None:
        """Return once it greets a client; the first time, the image is pulled. Raise BrokerError."""
        subprocess.run(["docker", "rm", "--force", self.NAME], capture_output=True)  # left by a run that was killed
        # RabbitMQ finds its data by host name.
        options = ["--rm", "--name", self.NAME, "--hostname", "predlog", "--volume", f"{self.NAME}:/var/lib/rabbitmq"]
        command = ["docker", "run", *options, "--publish", f"127.0.0.1:{self.port}:5672", self.IMAGE]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + timeout_seconds
        while not speaks_amqp(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BrokerError(f"the container {self.NAME} did not start: see what docker run {self.IMAGE} prints")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it cleanly. No-op if it does not run."""
        if self.process is not None:
            subprocess.run(["docker", "stop", "--time", "20", self.NAME], capture_output=True)
            self.process.wait()


def main() -> int:
    """Run everything; return the exit code: 0 after Ctrl-C, 130 after two, else that of what ended first, or 1."""
    broker: RabbitMQ | Container | None = None
    processes: dict[str, subprocess.Popen[bytes]] = {}
    code = interrupts = 0
    stopping = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts, stopping
        interrupts += 1
        if not stopping:
            stopping = True
            raise KeyboardInterrupt
        for process in (*processes.values(), *([broker.process] if broker and broker.process else [])):
            process.kill()  # whoever waits for it continues

    take_the_terminal()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        try:
            broker = choose_broker()
            environment = dict(os.environ)
            if broker is not None:
                broker.start()
                environment["AMQP_URL"] = broker.url
            for name in ("producer", "consumer"):
                processes[name] = spawn(name, environment)
            code = watch(processes, broker.process if broker else None, lambda: stopping)
        except BrokerError as error:
            print(f"make run: {error}", file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        say("Stopping; Ctrl-C again stops at once")
    stopping = True
    for process in processes.values():
        stopped_with = stop(process)
        code = code or stopped_with
    if broker is not None:
        broker.stop()
    return 130 if interrupts > 1 else code


def choose_broker() -> RabbitMQ | Container | None:
    """Return a broker to start, or None when there already is one. Raise BrokerError."""
    if os.environ.get("AMQP_URL") or os.environ.get("RABBITMQ_HOST"):
        return None
    if speaks_amqp(AMQP_PORT):
        stored = f"; messages in {NODE_DIRECTORY} stay there" if NODE_DIRECTORY.exists() else ""
        say(f"Using the RabbitMQ that answers on localhost:{AMQP_PORT}{stored}")
        return None
    if is_installed() or apt_install("rabbitmq-server"):
        node = RabbitMQ(NODE_DIRECTORY, AMQP_PORT)
        say(f"Starting a private RabbitMQ on port {node.port}; its data is in {NODE_DIRECTORY}")
        return node
    if Container.is_possible():
        container = Container()
        say(f"Starting RabbitMQ in the container {container.NAME} on port {container.port}")
        return container
    raise BrokerError(
        "there is no RabbitMQ. Set AMQP_URL to one, or install it (sudo apt-get install rabbitmq-server), "
        "or start a Docker engine"
    )


def spawn(name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [PYTHON, ROOT / f"{name}.py"],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # this program, not the terminal, decides what stops when
        preexec_fn=orphans_get(signal.SIGTERM),
    )


def watch(
    processes: dict[str, subprocess.Popen[bytes]],
    broker: subprocess.Popen[bytes] | None,
    interrupted: Callable[[], bool],
) -> int:
    """Say when and where to POST; return as soon as one of them ends, with its exit code (never 0).

    Raise KeyboardInterrupt once `interrupted`: Python drops one that is raised in a callback, such as an import's.
    """
    watched = processes | ({"RabbitMQ": broker} if broker else {})
    announced = False
    while not (ended := [name for name, process in watched.items() if process.poll() is not None]):
        if interrupted():
            raise KeyboardInterrupt
        if not announced and is_ready():
            say(announcement())
            announced = True
        time.sleep(0.1)
    code = watched[ended[0]].returncode
    print(f"make run: {ended[0]} ended with exit code {code}; stopping the rest", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code or 1


def stop(process: subprocess.Popen[bytes]) -> int:
    """Send SIGTERM, and return the exit code. SHUTDOWN_TIMEOUT_MS bounds the drain."""
    process.terminate()
    return process.wait()


def is_ready() -> bool:
    """Return whether the producer would accept an event now."""
    untrusted = ssl._create_unverified_context()  # it is ours, whatever name is in its certificate
    with contextlib.suppress(OSError, HTTPException):
        urllib.request.urlopen(f"{producer_url()}/readyz", timeout=2, context=untrusted).close()
        return True
    return False


def producer_url() -> str:
    host = os.environ.get("HTTP_HOST", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"{'https' if os.environ.get('TLS_CERT') else 'http'}://{host}:{os.environ.get('HTTP_PORT') or 8000}"


def announcement() -> str:
    token = ' -H "Authorization: Bearer ${API_TOKEN%%,*}"' if os.environ.get("API_TOKEN") else ""
    csv_file = os.environ.get("CSV_FILE") or "data/data.csv"
    return f"""
Ready. POST events to {producer_url()}/process, for example:

  curl -i {producer_url()}/process{token} -H 'Content-Type: application/json' -d '{EXAMPLE}'

Their predictions become rows of {csv_file}. Ctrl-C stops everything.
"""


def take_the_terminal() -> None:
    """Take Ctrl-C for us alone: make would call even a clean stop an error. Ctrl-Z would stop only half the run."""
    with contextlib.suppress(OSError):  # no terminal
        group_of_make = os.tcgetpgrp(0)
        if group_of_make != os.getpgrp():
            return
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgrp())
        atexit.register(os.tcsetpgrp, 0, group_of_make)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
