"""Any interleaving of pieces, answers, stalls and ends: answers are in order, one each, and no memory stays counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import HttpError
from common.http.connection import Connection, ServerState
from common.http.exchange import Exchange
from common.http.parser import Head, Limits, Request
from common.http.phases import ServerLimits
from common.http.turns import Turns
from tests.support.transport import FakeTransport

LIMITS = ServerLimits(
    request=Limits(body_bytes=200),
    connections=10,
    pipelined=3,
    buffered_bytes=150,
    head_seconds=10.0,
    body_seconds=10.0,
    idle_seconds=50.0,
    write_seconds=20.0,
)
ROOMY = replace(LIMITS, buffered_bytes=10_000)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def get(self) -> float:
        return self.now


class Recorder:
    """An application that keeps its exchanges until they are answered. /now, /slow, /refused and /bug do as named."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.checked: list[bytes] = []
        self.handled: list[bytes] = []
        self.statuses: list[int] = []
        self.waiting: list[Exchange] = []

    def check(self, head: Head) -> bytes:
        self.checked.append(head.query)
        if head.path == b"/refused":
            raise HttpError(404, "no such page")
        return b""

    def handle(self, request: Request, exchange: Exchange) -> None:
        self.handled.append(request.head.query)
        if request.head.path == b"/slow":
            self.clock.now += 0.01
        if request.head.path in (b"/now", b"/slow"):
            exchange.answer(200, request.head.query)
        elif request.head.path == b"/bug":
            raise HttpError(500, "broken")
        else:
            self.waiting.append(exchange)

    def answered(self, exchange: Exchange, status: int) -> None:
        self.statuses.append(status)


def request(number: int, kind: str) -> bytes:
    path = kind if kind in ("now", "slow", "refused", "bug") else "later"
    if kind == "bad":
        return b"GET /later?%d HTTP/1.1\r\nHost : h\r\n\r\n" % number
    head = f"POST /{path}?{number} HTTP/1.1\r\nHost: h\r\n".encode()
    if kind == "last":
        return head + b"Connection: close\r\n\r\n"
    if kind == "sized":
        return head + b"Content-Length: 100\r\n\r\n" + b"x" * 100
    if kind == "large":
        return head + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000
    if kind == "chunked":
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 12 + b"0\r\n\r\n"
    if kind == "expect":
        return head + b"Content-Length: 20\r\nExpect: 100-continue\r\n\r\n" + b"y" * 20
    return head + b"\r\n"


PEACEFUL = ["later", "now", "slow", "sized", "chunked", "expect"]
KINDS = [*PEACEFUL, "refused", "bug", "last", "bad", "large"]
STEPS = st.one_of(
    st.tuples(st.just("data"), st.integers(1, 400)),
    st.tuples(st.just("answer"), st.integers(0, 10)),
    st.tuples(st.sampled_from(["pause", "resume", "turn"]), st.just(0)),
)
TROUBLE = st.one_of(
    STEPS, st.tuples(st.just("time"), st.integers(1, 60)), st.tuples(st.sampled_from(["eof", "drain"]), st.just(0))
)
ANSWER = re.compile(rb"HTTP/1\.1 (\d+) [^\r]*\r\n(?:([^\r]+(?:\r\n[^\r]+)*)\r\n)?\r\n")


class Client:
    """One connection, driven by hand."""

    def __init__(self, kinds: list[str], limits: ServerLimits) -> None:
        self.clock = Clock()
        self.application = Recorder(self.clock)
        self.soon: list[Callable[[], None]] = []
        now = self.clock.get
        self.state = ServerState(limits, self.application, now, Turns(self.soon.append, now))
        self.transport = FakeTransport()
        self.connection = Connection(self.state)
        self.connection.connection_made(self.transport)
        self.rest = b"".join(request(number, kind) for number, kind in enumerate(kinds))
        self.ended = False

    def step(self, what: str, size: int) -> None:
        application, connection, transport = self.application, self.connection, self.transport
        if what == "answer":
            if application.waiting:
                exchange = application.waiting.pop(size % len(application.waiting))
                assert exchange.head is not None
                exchange.answer(200, exchange.head.query)
        elif transport.closing:
            return
        elif what == "data":
            if transport.reading and not self.ended and self.rest:
                piece, self.rest = self.rest[:size], self.rest[size:]
                connection.data_received(piece)
        elif what == "pause":
            if not transport.unsent:
                transport.unsent = 10
                connection.pause_writing()
        elif what == "resume":
            if transport.unsent:
                transport.unsent = 0
                connection.resume_writing()
        elif what == "turn":
            soon, self.soon[:] = list(self.soon), []
            for call in soon:
                call()
        elif what == "time":
            self.clock.now += size
            connection.sweep(self.clock.now)
        elif what == "eof":
            if transport.reading and not self.ended:
                self.ended = True
                if not connection.eof_received():
                    transport.close()
        else:
            self.state.drain()

    def finish(self) -> None:
        """Deliver all that is left to come."""
        for _ in range(200):
            self.step("resume", 0)
            self.step("turn", 0)
            self.step("answer", 0)
            self.step("data", 1000)

    def answers(self) -> list[tuple[int, bytes, bytes]]:
        found, rest = [], bytes(self.transport.sent)
        while rest:
            match = ANSWER.match(rest)
            assert match is not None, rest
            status, fields = int(match[1]), match[2] or b""
            rest = rest[match.end() :]
            length = re.search(rb"Content-Length: (\d+)", fields)
            size = int(length[1]) if length else 0
            found.append((status, fields, rest[:size]))
            rest = rest[size:]
        return found

    def lose(self) -> None:
        self.transport.abort()
        self.connection.connection_lost(None)
        for exchange in self.application.waiting:
            exchange.answer(200, b"too late")  # is sent to nobody
        self.step("turn", 0)
        assert not self.state.pool.members
        assert self.state.pool.held_bytes == 0


def in_order(client: Client) -> list[tuple[int, bytes, bytes]]:
    """Return the final answers. Fail unless they are of the handled requests, in order, and at most one refusal."""
    final = [answer for answer in client.answers() if answer[0] != 100]
    application = client.application
    assert len(application.checked) == len(set(application.checked)), "a request was checked twice"
    assert set(application.handled) <= set(application.checked), "a request was handled without a check"
    numbers = [body for status, _, body in final if status == 200]
    assert numbers == sorted(numbers, key=int)
    assert set(numbers) <= set(application.handled)
    for position, (_, fields, _) in enumerate(final):
        if b"Connection: close" in fields:
            assert position == len(final) - 1, "an answer after the last one"
    return final


def play(
    kinds: list[str], steps: list[tuple[str, int]], limits: ServerLimits, check: Callable[[Client], object]
) -> None:
    client = Client(kinds, limits)
    for what, size in steps:
        client.step(what, size)
        in_order(client)
        assert client.connection.held_bytes == client.state.pool.held_bytes
    client.finish()
    check(client)
    client.lose()


@given(st.lists(st.sampled_from(KINDS), max_size=8), st.lists(TROUBLE, max_size=30))
@settings(max_examples=300)
def test_answers_are_in_order_and_one_each(kinds: list[str], steps: list[tuple[str, int]]) -> None:
    play(kinds, steps, LIMITS, in_order)


@given(st.lists(st.sampled_from(PEACEFUL), max_size=8), st.lists(STEPS, max_size=30))
@settings(max_examples=200)
def test_each_good_request_is_answered(kinds: list[str], steps: list[tuple[str, int]]) -> None:
    def check(client: Client) -> None:
        final = in_order(client)
        assert [(status, int(body)) for status, _, body in final] == [(200, number) for number in range(len(kinds))]
        assert not client.transport.closing

    play(kinds, steps, ROOMY, check)
