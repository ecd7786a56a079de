"""The load generator against a small scripted server."""

import asyncio
import contextlib
import gzip
import io
import json
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from common.event.rows import csv_rows
from scripts.load import generator
from scripts.load.client import Connection, Target
from scripts.load.events import VARIANTS, Events
from scripts.load.generator import Load, percentile
from scripts.load.ledger import CUT
from scripts.load.verify import opened

EVENTS = Events(seed=3)


class Server:
    """A server that answers each request with `decide(number of the request)`: a status, CUT, or None for no answer."""

    def __init__(self, decide: Callable[[int], int | None]) -> None:
        self.bodies: list[bytes] = []
        self.keys: list[bytes] = []
        self._decide = decide

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                body = await reader.readexactly(int(fields[b"Content-Length"]))
                self.bodies.append(body)
                self.keys.append(fields.get(b"Idempotency-Key", b""))
                status = self._decide(len(self.bodies) - 1)
                if status == CUT:
                    break
                if status is not None:
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass


def serve(server: Server, use: Callable[[Target], Awaitable[None]]) -> None:
    handling: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await server.handle(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def run() -> None:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handling.add(asyncio.create_task(handle(reader, writer)))

        listening = await asyncio.start_server(connected, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()
        async with asyncio.timeout(20):
            await use(Target.parse(f"http://{host}:{port}"))
            listening.close()
            await asyncio.gather(*handling)

    asyncio.run(run())


def drive(decide: Callable[[int], int | None], **options: object) -> tuple[Server, Load]:
    server, loads = Server(decide), []

    async def use(target: Target) -> None:
        load = Load(target, EVENTS, **options)  # type: ignore[arg-type]
        loads.append(load)
        await load.run()

    serve(server, use)
    return server, loads[0]


def device_id(body: bytes) -> str:
    return str(json.loads(body)["device_id"])


@pytest.mark.parametrize("pipeline", [1, 8])
def test_every_event_is_sent_once_and_every_answer_recorded(pipeline: int) -> None:
    log = io.StringIO()
    server, load = drive(lambda _: 200, count=300, concurrency=16, pipeline=pipeline, log=log)
    assert sorted(map(device_id, server.bodies)) == [EVENTS.id(n).decode() for n in range(len(load.ledger))]
    assert load.ledger.answers == {200: len(load.ledger)}
    assert set(load.ledger.accepted) == {1}
    assert load.wrong_answers == 0
    assert [json.loads(line)["status"] for line in log.getvalue().splitlines()] == [200] * len(load.ledger)


def test_an_answer_other_than_200_is_recorded_as_what_it_means() -> None:
    script = [200, 503, 504, 422, CUT, 500]
    _, load = drive(lambda n: script[n], count=6, concurrency=1)
    assert list(load.ledger.accepted) == [1, 0, 0, 0, 0, 0]
    assert list(load.ledger.unknown) == [0, 0, 1, 0, 1, 1]
    assert load.ledger.accepted_events == 1


def test_with_retries_an_event_is_sent_until_it_is_answered_200() -> None:
    server, load = drive(lambda n: (503, 504, CUT, 200)[n % 4], count=5, concurrency=1, retries=True)
    assert list(load.ledger.accepted[1:]) == [1] * 4
    sent = Counter(zip(map(device_id, server.bodies), server.keys, strict=True))
    assert sent == {(EVENTS.id(n).decode(), EVENTS.key(n)): 4 for n in range(5)}
    assert len(set(server.bodies)) > 5, "some retries write the same event in another way"


def test_a_refusal_for_good_is_not_retried() -> None:
    server, _ = drive(lambda _: 422, count=5, concurrency=1, retries=True)
    assert len(server.bodies) == 5


def test_with_retries_some_answered_events_are_sent_again() -> None:
    server, load = drive(lambda _: 200, count=3000, concurrency=8, retries=True)
    assert set(load.ledger.accepted) == {1, 2}
    assert len(server.bodies) > len(load.ledger) + 60


def test_no_answer_in_time_is_a_cut_and_the_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "ANSWER_TIMEOUT_SECONDS", 0.2)
    _, load = drive(lambda _: None, count=1, concurrency=1)  # which ends within 20 s, or fails
    assert load.ledger.answers == {CUT: 1}


def test_a_producer_that_is_away_is_waited_for_and_given_up(monkeypatch: pytest.MonkeyPatch, nobodys_port: int) -> None:
    monkeypatch.setattr(generator, "GIVE_UP_SECONDS", 0.3)

    async def run() -> Load:
        load = Load(Target("127.0.0.1", nobodys_port, "/process"), EVENTS, count=1, concurrency=1)
        await load.run()
        return load

    load = asyncio.run(run())
    assert load.gave_up == 1
    assert not load.ledger.answers, "nothing was sent"


def test_an_answer_with_another_event_is_wrong() -> None:
    answers = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers)

    server = Server(lambda _: 200)
    server.handle = handle  # type: ignore[method-assign]
    loads = []

    async def use(target: Target) -> None:
        loads.append(Load(target, EVENTS, count=1, concurrency=1))
        await loads[0].run()

    serve(server, use)
    assert loads[0].wrong_answers == 1


def test_a_rate_is_kept() -> None:
    started = time.monotonic()
    _, load = drive(lambda _: 200, count=50, concurrency=4, rate=100)
    assert time.monotonic() - started > 0.4, "50 at 100 per second"
    assert load.ledger.answers[200] >= 50


def test_answers_are_matched_however_the_bytes_are_split() -> None:
    answers = b"HTTP/1.1 100 Continue\r\n\r\n" + b"".join(
        b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (200 + n, n, b"x" * n) for n in range(4)
    )

    async def run(size: int) -> None:
        connection = Connection(5)
        connection._transport = _Transport()
        pending = [connection.send(b"request") for _ in range(4)]
        for at in range(0, len(answers), size):
            connection.data_received(answers[at : at + size])
        assert [((await answer).status, len((await answer).body)) for answer in pending] == [
            (200 + n, n) for n in range(4)
        ]

    for size in range(1, len(answers) + 1):
        asyncio.run(run(size))


class _Transport(asyncio.Transport):
    def is_closing(self) -> bool:
        return False

    def write(self, data: object) -> None:
        pass


@pytest.mark.parametrize("variant", range(VARIANTS))
def test_expected_rows_are_what_the_program_writes(variant: int) -> None:
    for number in range(300):
        parts, _ = csv_rows(EVENTS.body(number, variant), 0.25)
        assert "".join(parts).encode() == b"".join(EVENTS.rows(number))


@pytest.mark.parametrize("url", ["https://x", "ftp://x", "http://"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Target.parse(url)


def test_a_url_names_host_port_and_path() -> None:
    assert Target.parse("http://box:8000") == Target("box", 8000, "/process")
    assert Target.parse("box:81/other") == Target("box", 81, "/other")


def test_the_files_of_a_csv_are_live_and_rotated_each_once(tmp_path: Path) -> None:
    names = ["data.csv", "data-1.csv", "data-2.csv.gz", "data-3.csv", "data-3.csv.gz"]
    others = ["data.csv.journal", "data.csv.uncommitted-1", "data-4.csv.gz.part", "other.csv"]
    for name in names + others:
        (tmp_path / name).write_bytes(gzip.compress(b"x") if name.endswith(".gz") else b"x")
    found = [(name, stream.read()) for name, stream in opened(tmp_path / "data.csv")]
    assert sorted(name for name, _ in found) == ["data-1.csv", "data-2.csv.gz", "data-3.csv.gz", "data.csv"]
    assert {content for _, content in found} == {b"x"}


def test_files_of_partitions_are_found_with_rotated_ones(tmp_path: Path) -> None:
    names = ["data.0.csv", "data.0-1.csv", "data.10.csv", "data.10-2.csv.gz"]
    for name in [*names, "data.0.csv.journal", "data.old.csv"]:
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert sorted(name for name, _ in opened(tmp_path / "data.csv")) == sorted(names)


def test_percentiles() -> None:
    values = array("f", range(100, 0, -1))
    assert [percentile(values, p) for p in (0, 50, 99, 100)] == [1, 51, 100, 100]
    assert percentile(array("f"), 50) == 0
