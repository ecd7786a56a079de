"""The producer's contract over real HTTP with a real broker, and what reaches the queue."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import aiormq
import pytest

from tests.conftest import Service, Start
from tests.rabbitmq import RabbitMQ
from tests.support.polling import wait_until

EVENT: dict[str, Any] = {
    "device_id": "d",
    "client_id": "c",
    "created_at": "2024-05-01T10:00:00",
    "data": {"license_id": "l", "preds": [{"image_frame": "f", "prob": 0.5, "tags": ["cat"]}]},
}

Answer = tuple[int, dict[str, str], Any]


def call(service: Service, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    """Status, header fields in lower case, and the body: parsed when it is JSON."""
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
        fields = {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()
    if content and fields.get("content-type") == "application/json":
        return response.status, fields, json.loads(content)
    return response.status, fields, content


def post(service: Service, document: Any, path: str = "/process", **headers: str) -> Answer:
    return call(service, "POST", path, json.dumps(document).encode(), **headers)


async def messages(broker: RabbitMQ, queue: str, count: int) -> list[Any]:
    """Take `count` messages from a queue (by consuming: RabbitMQ refuses basic.get with a single active consumer)."""
    taken: asyncio.Queue[Any] = asyncio.Queue()
    async with aiormq.connect(broker.url) as connection, asyncio.timeout(40):
        channel = await connection.channel()
        await channel.basic_consume(queue, taken.put, no_ack=True)
        return [await taken.get() for _ in range(count)]


async def test_200_echoes_the_event_as_it_was_published(producer: Start, broker: RabbitMQ, queue_name: str) -> None:
    service = producer()
    odd = {"data": {"preds": [{"tags": [], "prob": "1", "image_frame": "f", "x": 1}], "license_id": 7}, "more": None}
    body = json.dumps({"created_at": 5, "client_id": -3, "device_id": "ü", **odd}, indent=1).encode()
    with contextlib.closing(http.client.HTTPConnection(service.url.removeprefix("http://"))) as connection:
        connection.request("POST", "/process", body)
        echoed = connection.getresponse().read()
    expected = (
        '{"device_id":"ü","client_id":"-3","created_at":"5",'
        '"data":{"license_id":"7","preds":[{"image_frame":"f","prob":1.0,"tags":[]}]}}'
    )
    assert echoed == expected.encode()
    [message] = await messages(broker, queue_name, 1)
    properties = message.header.properties
    assert message.body == echoed
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    assert len(properties.message_id) == 32
    assert int(properties.message_id, 16) >= 0
    assert abs(properties.timestamp.timestamp() - time.time()) < 30


async def test_a_queue_with_other_arguments_is_one_clear_line(
    producer: Start, consumer: Start, broker: RabbitMQ, queue_name: str
) -> None:
    async with aiormq.connect(broker.url) as connection:
        channel = await connection.channel()
        await channel.queue_declare(queue_name, durable=True)
    for start in (producer, consumer):
        service = start(wait=False)
        assert service.process.wait(20) == 1
        last = service.log().strip().splitlines()[-1]
        assert queue_name in last
        assert "inequivalent arg 'x-" in last
        assert "Traceback" not in service.log()


def test_a_malformed_event_is_422_that_names_every_fault(producer: Start) -> None:
    service = producer()
    document = {
        "client_id": True,
        "created_at": "t",
        "data": {"license_id": "l", "preds": [{"image_frame": 1, "prob": "x"}]},
    }
    status, _, answer = post(service, document)
    assert status == 422
    assert sorted(((fault["loc"], fault["type"]) for fault in answer["detail"]), key=str) == sorted(
        [
            (["body", "device_id"], "missing"),
            (["body", "client_id"], "string_type"),
            (["body", "data", "preds", 0, "image_frame"], "string_type"),
            (["body", "data", "preds", 0, "prob"], "float_parsing"),
            (["body", "data", "preds", 0, "tags"], "missing"),
        ],
        key=str,
    )
    status, _, answer = call(service, "POST", "/process", b"{")
    assert (status, answer["detail"][0]["type"]) == (422, "json_invalid")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "field"),
    [
        ("GET", "/nowhere", {}, 404, None),
        ("GET", "/process", {}, 405, ("allow", "POST")),
        ("POST", "/readyz", {}, 405, ("allow", "GET, HEAD")),
        ("BREW", "/process", {}, 501, None),
        ("POST", "/process", {"Content_Type": "text/plain"}, 415, None),
        ("POST", "/process", {"Content_Type": "application/x-ndjson"}, 415, None),
        ("POST", "/process", {"Content_Type": "application/json; charset=latin-1"}, 415, None),
        ("POST", "/process", {"Content_Type": "application/vnd.x+json; charset=UTF-8"}, 200, None),
        ("POST", "/process", {"Content_Encoding": "br"}, 415, ("accept-encoding", "gzip")),
        ("POST", "/process/", {"Content_Encoding": "identity"}, 200, None),
        ("POST", "/process?x=%zz", {"Content_Type": "application/json; charset=us-ascii"}, 200, None),
        ("POST", "/process", {"Idempotency_Key": "a b"}, 400, None),
        ("POST", "/process", {"Idempotency_Key": "k" * 256}, 400, None),
        ("POST", "/process", {"Idempotency_Key": '"quoted"'}, 200, None),
        ("POST", "/process", {"Expect": "tea"}, 417, None),
        ("HEAD", "/healthz", {}, 200, None),
        ("GET", "/healthz", {}, 200, None),
        ("GET", "/docs", {}, 200, ("x-content-type-options", "nosniff")),
        ("GET", "/openapi.json", {}, 200, ("content-type", "application/json")),
        ("GET", "/metrics", {}, 200, ("content-type", "text/plain; version=0.0.4; charset=utf-8")),
        ("OPTIONS", "*", {}, 200, None),
    ],
)
def test_every_refusal_has_its_status(
    shared_producer: Service,
    method: str,
    path: str,
    headers: dict[str, str],
    status: int,
    field: tuple[str, str] | None,
) -> None:
    body = json.dumps(EVENT).encode() if method in ("POST", "BREW") else None
    got, fields, answer = call(shared_producer, method, path, body, **headers)
    assert got == status
    if status >= 400:
        assert isinstance(answer["detail"], str)
    if field is not None:
        assert fields[field[0]] == field[1]


@pytest.fixture(scope="module")
def shared_producer(request: pytest.FixtureRequest, broker: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One producer for the tests that only ask."""
    from scripts.rabbitmq import free_port

    port = free_port()
    environment = {"AMQP_URL": broker.url, "QUEUE_NAME": "test-shared", "HTTP_PORT": str(port)}
    service = Service("producer", f"http://127.0.0.1:{port}", environment, tmp_path_factory.mktemp("shared"))
    service.wait_until_ready()
    yield service
    service.stop()


async def test_key_and_event_together_give_the_message_id(producer: Start, broker: RabbitMQ, queue_name: str) -> None:
    service = producer()
    other = {**EVENT, "device_id": "e"}
    for document, key in ((EVENT, "k"), (EVENT, '"k"'), (other, "k"), (EVENT, "k2")):
        assert post(service, document, Idempotency_Key=key)[0] == 200
    ids = [message.header.properties.message_id for message in await messages(broker, queue_name, 4)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


async def test_gzip_is_inflated_within_the_body_limit(producer: Start, broker: RabbitMQ, queue_name: str) -> None:
    service = producer(MAX_BODY_BYTES=1000)
    packed = gzip.compress(json.dumps(EVENT).encode())
    assert call(service, "POST", "/process", packed, Content_Encoding="gzip")[2] == EVENT
    assert call(service, "POST", "/process", gzip.compress(b" " * 1001), Content_Encoding="gzip")[0] == 413
    assert call(service, "POST", "/process", packed[:-3], Content_Encoding="gzip")[0] == 400
    assert call(service, "POST", "/process", b" " * 1001)[0] == 413
    assert len(await messages(broker, queue_name, 1)) == 1


@pytest.mark.parametrize("lines", [True, False])
async def test_a_batch_answers_for_each_event_after_its_confirm(
    producer: Start, broker: RabbitMQ, queue_name: str, lines: bool
) -> None:
    service = producer(MAX_UNCONFIRMED=2)  # a batch larger than the window still goes through
    documents = [{**EVENT, "device_id": f"d{number}"} for number in range(20)]

    def send(batch: list[Any], key: str) -> Answer:
        if not lines:
            return post(service, batch, "/process/batch", Idempotency_Key=key)
        body = b"\n".join(json.dumps(document).encode() for document in batch)
        return call(service, "POST", "/process/batch", body, Content_Type="application/x-ndjson", Idempotency_Key=key)

    status, _, answer = send(documents, "k")
    assert (status, answer) == (200, {"accepted": 20, "results": [{"status": 200}] * 20})
    assert send(documents, "k")[0] == 200
    ids = [message.header.properties.message_id for message in await messages(broker, queue_name, 40)]
    assert len(set(ids)) == 20, "a retry has the ids of the first try, and no two events share one"

    status, _, answer = send([EVENT, {"device_id": "x"}], "k2")
    assert status == 207
    assert answer["accepted"] == 1
    assert [result["status"] for result in answer["results"]] == [200, 422]
    assert answer["results"][1]["detail"][0]["loc"][:2] == ["body", 1]
    assert len(await messages(broker, queue_name, 1)) == 1


def test_tokens_guard_post_and_leave_health_open(producer: Start) -> None:
    """Tokens keep strangers out of post and leave health open."""
    service = producer(API_TOKEN="old,shop-1:new", PROTECT_PAGES=1, WORKERS=2)

    def both_are_connected() -> bool:
        page = call(service, "GET", "/metrics", Authorization="Bearer old")[2]
        return b"\npredlog_amqp_connected 1\n" in page  # the least of all workers

    wait_until("both are connected", both_are_connected, explain=service.log)
    status, fields, _ = post(service, EVENT)
    assert (status, fields["www-authenticate"]) == (401, 'Bearer realm="predlog"')
    assert post(service, EVENT, Authorization="Bearer wrong")[0] == 401
    assert post(service, EVENT, Authorization="Basic old")[0] == 401
    for token in ("old", "new"):
        assert post(service, EVENT, Authorization=f"Bearer {token}")[0] == 200
        assert call(service, "GET", "/metrics", Authorization=f"bearer {token}")[0] == 200
    assert call(service, "GET", "/metrics")[0] == 401
    assert call(service, "GET", "/readyz")[0] == 200
    assert (
        b'\npredlog_token_requests_total{token="shop-1"} 3\n'
        in call(service, "GET", "/metrics", Authorization="Bearer new")[2]
    )
    assert "wrong" not in service.log()
    assert "old" not in service.log()


def test_pipelined_requests_are_answered_in_order(
    shared_producer: Service,
) -> None:
    """Pipelined requests are answered in order though their confirms take their time."""
    requests = b""
    for number in range(100):
        if number % 3 == 2:
            requests += b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
            continue
        body = json.dumps({**EVENT, "device_id": f"d{number}"}).encode()
        requests += b"POST /process HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    requests += b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    host, _, port = shared_producer.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 20) as client:
        client.sendall(requests)
        answers = b"".join(iter(lambda: client.recv(65536), b""))
    bodies = [part.partition(b"\r\n\r\n")[2] for part in answers.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert [json.loads(body).get("device_id", "health") for body in bodies] == [
        "health" if number % 3 == 2 else f"d{number}" for number in range(100)
    ] + ["health"]


def test_expect_100_continue_refuses_a_body_before_it_is_read(
    shared_producer: Service,
) -> None:
    """Expect 100 continue is sent for a welcome body and refused bodies are not read."""
    host, _, port = shared_producer.url.removeprefix("http://").partition(":")
    body = json.dumps(EVENT).encode()
    for path, first in ((b"/process", b"HTTP/1.1 100 "), (b"/nowhere", b"HTTP/1.1 404 ")):
        with socket.create_connection((host, int(port)), 20) as client:
            client.sendall(
                b"POST %b HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
            )
            assert client.recv(65536).startswith(first)
            if first == b"HTTP/1.1 100 ":
                client.sendall(body)
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("which", ["producer", "consumer"])
def test_why_there_is_no_broker_is_told_in_words(which: str, request: pytest.FixtureRequest, nobodys_port: int) -> None:
    start: Callable[..., Service] = request.getfixturevalue(which)
    service = start(wait=False, AMQP_URL=f"amqp://127.0.0.1:{nobodys_port}/")
    wait_until("the log says why", lambda: "no broker at" in service.log(), explain=service.log)
    status, _, answer = call(service, "GET", "/readyz")
    assert status == 503
    assert "Connection refused" in answer["detail"]
    assert "nothing was accepted" not in answer["detail"]


@pytest.mark.parametrize("which", ["producer", "consumer"])
@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"AMQP_URL": "amqp://guest:wrong@127.0.0.1:{port}/"}, 1, "refused user or password"),
        ({"AMQP_URL": "amqp://guest:guest@127.0.0.1:{port}/nowhere"}, 1, "denies access"),
        ({"LOG_LEVEL": "loud"}, 2, "LOG_LEVEL"),
    ],
)
def test_what_waiting_does_not_fix_is_exit_1_with_one_line(
    which: str, settings: dict[str, str], code: int, words: str, request: pytest.FixtureRequest, broker: RabbitMQ
) -> None:
    start: Callable[..., Service] = request.getfixturevalue(which)
    service = start(wait=False, **{name: value.format(port=broker.port) for name, value in settings.items()})
    assert service.process.wait(20) == code
    log = service.log()
    assert words in log.splitlines()[-1]
    assert "Traceback" not in log
    assert "wrong" not in log


def test_the_largest_bounds_that_are_taken_work(producer: Start) -> None:
    most = str(2**40)
    service = producer(MAX_BODY_BYTES=most, CONFIRM_TIMEOUT_MS=most, MAX_UNCONFIRMED=most)
    body = gzip.compress(json.dumps(EVENT).encode())
    assert call(service, "POST", "/process", body, Content_Encoding="gzip")[0] == 200
    assert service.stop() == 0


def test_for_machines_the_last_words_are_json_too(consumer: Start, broker: RabbitMQ) -> None:
    service = consumer(wait=False, LOG_FORMAT="json", AMQP_URL=broker.url.replace("guest:guest", "guest:wrong"))
    assert service.process.wait(20) == 1
    last = [json.loads(line) for line in service.log().splitlines()][-1]
    assert "refused user or password" in last["message"]
    assert last["level"] == "critical"


def test_what_ends_several_workers_is_a_line_each(producer: Start, broker: RabbitMQ) -> None:
    """What ends several workers is said in a line by those it ended."""
    service = producer(wait=False, WORKERS=3, AMQP_URL=broker.url.replace("guest:guest", "guest:wrong"))
    assert service.process.wait(20) == 1
    said = [line for line in service.log().splitlines() if " info " not in line]
    assert 1 <= len(said) <= 3, service.log()
    assert all("refused user or password" in line for line in said)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_busy_port_is_one_clear_line(producer: Start, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        service = producer(wait=False, HTTP_PORT=other.getsockname()[1], WORKERS=workers)
        assert service.process.wait(20) == 1
        assert str(other.getsockname()[1]) in service.log().splitlines()[-1]
        assert "Traceback" not in service.log()


def test_an_unwritable_csv_folder_is_one_clear_line(consumer: Start) -> None:
    service = consumer(wait=False, CSV_FILE="/proc/predlog/data.csv")
    assert service.process.wait(20) == 1
    assert "/proc" in service.log().splitlines()[-1]
    assert "Traceback" not in service.log()


def test_workers_share_a_port_and_metrics_and_are_replaced(producer: Start) -> None:
    """Several workers share the port add their metrics up and are replaced when they die."""
    import os
    import signal
    from pathlib import Path

    def children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def events(service: Service) -> float:
        return service.metric("predlog_events_total")

    service = producer(WORKERS=2)
    # The gauge is the least of all workers.
    wait_until("both are connected", lambda: service.metric("predlog_amqp_connected") == 1, explain=service.log)
    for _ in range(40):
        assert post(service, EVENT)[0] == 200
    assert {events(service) for _ in range(8)} == {40.0}
    first = children(service.process.pid)
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)
    wait_until("the killed one is reaped", lambda: first[0] not in children(service.process.pid), explain=service.log)
    deadline = time.monotonic() + 45
    answered = 40
    while answered < 60 or len(children(service.process.pid)) < 2 or service.metric("predlog_amqp_connected") < 1:
        assert post(service, EVENT)[0] == 200  # a new worker takes none before it has its broker
        answered += 1
        assert time.monotonic() < deadline, service.log()
    assert events(service) == answered
    assert service.stop() == 0
