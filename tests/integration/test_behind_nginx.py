"""Producers behind a real nginx: refusals reach the client, and no client sees stops and restarts."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT, Service, Start
from tests.integration.test_contract import EVENT
from tests.rabbitmq import RabbitMQ
from tests.support.child import WITH_US
from tests.support.nginx import needs_nginx, nginx, take_out
from tests.support.polling import wait_until

pytestmark = needs_nginx
BODY = json.dumps(EVENT).encode()


def post(url: str, body: bytes, **headers: str) -> int:
    client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        client.request("POST", "/process", body, headers)
        return client.getresponse().status
    finally:
        client.close()


class Load:
    """Clients that post a hundred times a second, each time on a new connection; every answer is counted."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.01):
            try:
                self.statuses[post(self._url, BODY)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.statuses[type(error).__name__] += 1

    def wait_for_more(self, answers: int = 200) -> None:
        wanted = self.statuses.total() + answers
        wait_until(f"{answers} more answers", lambda: self.statuses.total() >= wanted)


def test_a_refusal_of_a_large_body_reaches_the_client(producer: Start, tmp_path: Path) -> None:
    """nginx sends the whole body before it looks at an answer: a reset would be a 502, and take the producer out."""
    services = [producer(API_TOKEN="right") for _ in range(2)]
    with nginx(tmp_path / "nginx", [service.url for service in services], keep_alive=False) as url:
        for _ in range(3):
            assert post(url, b"x" * 20_000_000, Authorization="Bearer right") == 413
            assert post(url, b"x" * 8_000_000) == 401
        assert post(url, BODY, Authorization="Bearer right") == 200


DELAYS_MS = 2000, 8000, 32_000  # the longer ones are for a machine on which the shorter end before the proxy knows


def leave(service: Service, tell: Callable[[], None]) -> bool:
    """Stop a producer, and `tell` the proxy. Return whether the producer still listened after that."""
    service.process.terminate()
    tell()
    in_time = service.not_ready() == "the server is shutting down"
    assert service.process.wait(60) == 0
    return in_time


@pytest.mark.parametrize("keep_alive", [False, True])
def test_a_stop_behind_nginx_is_seen_by_nobody(producer: Start, tmp_path: Path, keep_alive: bool) -> None:
    """nginx does not poll /readyz, so its configuration is changed during the delay."""
    for delay_ms in DELAYS_MS:
        leaving, staying = producer(DRAIN_DELAY_MS=delay_ms), producer()
        folder = tmp_path / f"nginx-{delay_ms}"
        with nginx(folder, [leaving.url, staying.url], keep_alive) as url, Load(url) as load:
            in_time = leave(leaving, partial(take_out, folder, leaving.url))
            load.wait_for_more()
        if in_time:
            break
    assert set(load.statuses) == {200}, load.statuses


def test_a_drain_delay_listens_while_readyz_is_503(producer: Start) -> None:
    statuses: list[int] = []

    def post_meanwhile() -> None:
        wait_until("not ready", lambda: not service.is_ready())
        with contextlib.suppress(OSError):
            statuses.append(post(service.url, BODY))

    for delay_ms in DELAYS_MS:
        service = producer(DRAIN_DELAY_MS=delay_ms)
        if leave(service, post_meanwhile):
            break
    assert statuses[-1:] == [200]


class Activated:
    """A producer on a socket that somebody else holds, as systemd does."""

    def __init__(self, port: int, environment: dict[str, str], listener: socket.socket, log: Path) -> None:
        self._log = log.open("wb")
        command = f"exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec {sys.executable} {ROOT}/producer.py"
        self.process = subprocess.Popen(
            [*WITH_US, "bash", "-c", command],
            env={"PATH": os.environ["PATH"], "HTTP_PORT": str(port), **environment},
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0
        self._log.close()


def test_a_restart_on_a_held_socket_is_seen_by_nobody(broker: RabbitMQ, queue_name: str, tmp_path: Path) -> None:
    """As with deploy/systemd/predlog-producer.socket, clients that come while no producer runs wait for the next."""
    environment = {"AMQP_URL": broker.url, "QUEUE_NAME": queue_name}
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        port = listener.getsockname()[1]
        producer = Activated(port, environment, listener, tmp_path / "first.log")
        try:
            with nginx(tmp_path / "nginx", [f"http://127.0.0.1:{port}"], keep_alive=True) as url, Load(url) as load:
                producer.stop()
                producer = Activated(port, environment, listener, tmp_path / "second.log")
                load.wait_for_more()
            assert set(load.statuses) == {200}, load.statuses
        finally:
            producer.stop()
