"""Clients that are slow, greedy, half-dead or hostile: each gets what it deserves, and no other client notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Service, Start
from tests.integration.test_contract import EVENT, call, post
from tests.support.least import least
from tests.support.polling import wait_until

BODY = json.dumps(EVENT).encode()


def request(body: bytes = BODY, *, path: bytes = b"/process", length: int | None = None, extra: bytes = b"") -> bytes:
    size = len(body) if length is None else length
    return b"POST %b HTTP/1.1\r\nHost: h\r\n%bContent-Length: %d\r\n\r\n%b" % (path, extra, size, body)


@contextlib.contextmanager
def connected(service: Service, timeout: float = 20) -> Iterator[socket.socket]:
    host, _, port = service.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout) as client:
        yield client


def read_some(client: socket.socket) -> bytes:
    return client.recv(65536)


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def reset(client: socket.socket) -> None:
    """Vanish: the other side gets a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize(("token", "body_bytes", "status"), [("right", 9_000_000, 413), ("wrong", 8_000_000, 401)])
def test_a_client_that_reads_last_gets_its_refusal(producer: Start, token: str, body_bytes: int, status: int) -> None:
    service = producer(API_TOKEN="right")
    client = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=20)
    client.request("POST", "/process", b"x" * body_bytes, {"Authorization": f"Bearer {token}"})
    assert client.getresponse().status == status
    client.close()


def test_counts_do_not_depend_on_how_a_request_is_cut(producer: Start) -> None:
    service = producer(API_TOKEN="right")
    whole = request()
    for cut in (len(whole), whole.index(b"\r\n\r\n") + 4):
        with connected(service) as client:
            client.sendall(whole[:cut])
            assert read_some(client).startswith(b"HTTP/1.1 401 ")
    assert service.metric('predlog_http_requests_total{route="/process",status="401"}') == 2


def test_the_answer_to_a_refused_head_has_no_content(producer: Start) -> None:
    with connected(producer()) as client:
        client.sendall(b"HEAD /nowhere HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.endswith(b"\r\n\r\n")


def test_half_a_request_after_an_end_is_not_waited_for(producer: Start) -> None:
    with connected(producer(), timeout=10) as client:  # half of the time that a body has
        client.sendall(request() + request()[:-1])
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize(
    "smuggler",
    [
        b"POST /process HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /process HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 40\r\n\r\n",
        b"POST /process HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
        b"POST /process HTTP/1.1\r\nHost: h\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /process HTTP/1.1\r\nHost: h\r\nContent-Length: +4\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: h\nX: y\r\n\r\n",
    ],
)
def test_nothing_after_an_ambiguous_request_is_ever_answered(shared: Service, smuggler: bytes) -> None:
    with connected(shared) as client:
        client.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n" + smuggler + b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"
        )
        got = read_all(client)
    statuses = [int(part[:3]) for part in got.split(b"HTTP/1.1 ")[1:]]
    assert statuses[0] == 200
    assert len(statuses) == 2
    assert statuses[1] in (400, 501)
    assert b"Connection: close" in got


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One producer for the tests that leave it as they found it."""
    from scripts.rabbitmq import free_port

    port, broker = free_port(), request.getfixturevalue("broker")
    environment = {
        "AMQP_URL": broker.url,
        "QUEUE_NAME": "test-edge",
        "HTTP_PORT": str(port),
    }
    service = Service("producer", f"http://127.0.0.1:{port}", environment, tmp_path_factory.mktemp("edge"))
    service.wait_until_ready()
    yield service
    service.stop()


def test_a_refused_client_gets_its_answer_and_no_reset(producer: Start) -> None:
    service = producer(MAX_BODY_BYTES=1000)
    with connected(service) as client:
        client.sendall(request(b"x" * 500_000))
        got = read_all(client)
    assert got.startswith(b"HTTP/1.1 413 ")


def test_a_thousand_slow_clients_do_not_stop_a_fast_one(shared: Service) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(shared)) for _ in range(1000)]
        for number, client in enumerate(clients):
            client.sendall(b"POST /process HTT" if number % 2 else request(b'{"device', length=2000))
        for _ in range(100):
            assert post(shared, EVENT)[0] == 200
        for client in clients:
            client.sendall(b"x")  # they are still there


def test_hostile_bodies_do_not_stall_the_others(shared: Service) -> None:
    size = 8 * 2**20
    hostile = [
        b"[" * size,
        b"{}," * (size // 3),
        b'{"data":{"preds":[' + b"{}," * 2_700_000 + b"{}]}}",
        b'"' + b"a" * (size - 2) + b'"',
    ]

    def slowest() -> float:
        """Return the seconds of the slowest answer to another client while these bodies come."""
        done, most = threading.Event(), 0.0

        def attack() -> list[int]:
            try:
                return [call(shared, "POST", "/process", body)[0] for body in hostile]
            finally:
                done.set()

        with ThreadPoolExecutor(1) as pool:
            attacker = pool.submit(attack)
            while not done.is_set():
                began = time.monotonic()
                assert post(shared, EVENT)[0] == 200
                most = max(most, time.monotonic() - began)
            assert attacker.result() == [422] * 4
        return most

    assert least(slowest, 2.0) < 2.0, "a bound far above any noise, and far below a blocked loop's"


def test_clients_that_vanish_leave_nothing_behind(shared: Service) -> None:
    """They abort in the head, in the body, before the answer, half-open, and in a flood."""
    pid = shared.process.pid
    fds = Path(f"/proc/{pid}/fd")

    def flood(rounds: int) -> None:
        for number in range(rounds):
            with connected(shared) as client:
                kind = number % 5
                if kind == 0:
                    client.sendall(request()[:20])
                elif kind == 1:
                    client.sendall(request()[:-5])
                elif kind == 2:
                    client.sendall(request() * 3)
                elif kind == 3:
                    client.sendall(request())
                    client.shutdown(socket.SHUT_WR)
                    assert read_all(client).startswith(b"HTTP/1.1 200 ")  # a half-close is no abort
                if kind != 3:
                    reset(client)

    def memory() -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def settled() -> bool:
        return shared.metric("predlog_http_connections") <= 1 and shared.metric("predlog_unconfirmed") == 0

    flood(500)
    wait_until("all is settled", settled)
    before, open_files = memory(), len(list(fds.iterdir()))
    flood(2000)
    wait_until("no file is left open", lambda: settled() and len(list(fds.iterdir())) <= open_files)
    assert memory() - before < 4 * 2**20
    assert post(shared, EVENT)[0] == 200


def test_logs_hold_nothing_of_a_request(producer: Start) -> None:
    service = producer(LOG_LEVEL="debug")
    call(service, "GET", "/x%0aforged%20line", Authorization="Bearer hush-hush", User_Agent="forged-agent")
    post(service, {"device_id": "forged\nid"})
    for word in ("forged", "hush-hush"):
        assert word not in service.log()


def test_a_reset_in_a_full_pipeline_hangs_nobody(shared: Service) -> None:
    for _ in range(100):
        with connected(shared) as client:
            client.sendall(request() * 200)
            reset(client)
    assert post(shared, EVENT)[0] == 200


def test_a_stop_answers_every_pipelined_request(producer: Start) -> None:
    """It does not wait for one that was half sent."""
    service = producer(SHUTDOWN_TIMEOUT_MS=30_000)
    with connected(service) as whole, connected(service) as half:
        half.sendall(request()[:-5])
        whole.sendall(request() * 20)
        assert whole.recv(4).startswith(b"HTTP")  # the requests have been read
        began = time.monotonic()
        service.process.terminate()
        answers = b"HTTP" + read_all(whole)  # what was read above is its beginning
        assert read_all(half).startswith(b"HTTP/1.1 503 ")
    assert answers.count(b"HTTP/1.1 ") == 20
    assert service.process.wait(20) == 0
    assert time.monotonic() - began < 15


def test_memory_is_bounded_while_the_broker_is_away(producer: Start, nobodys_port: int) -> None:
    service = producer(wait=False, AMQP_URL=f"amqp://127.0.0.1:{nobodys_port}/")
    wait_until("there is room again", lambda: call_status(service, b"") == 422)
    body = json.dumps({**EVENT, "client_id": "x" * 200_000}).encode()
    statm = Path(f"/proc/{service.process.pid}/statm")

    def megabytes() -> float:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    for _ in range(20):
        assert call_status(service, body) == 503
    before = megabytes()
    for _ in range(1000):  # 200 MB in all
        assert call_status(service, body) == 503
    assert megabytes() - before < 50


def call_status(service: Service, body: bytes) -> int:
    try:
        return call(service, "POST", "/process", body)[0]
    except ConnectionError:  # it does not listen yet
        return 0
