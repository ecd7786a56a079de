"""Connections, seen through a transport that keeps the calls. Time is a number that the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from common.errors import HttpError
from common.http.connection import Connection, ServerState
from common.http.exchange import Exchange
from common.http.parser import Head, Limits, Request
from common.http.phases import (
    CLOSED,
    IDLE,
    LAST_REQUEST_SECONDS,
    LINGER_SECONDS,
    NEXT,
    Phase,
    ServerLimits,
    after_progress,
)
from common.http.pool import MOST_LEAVING, SILENT_SECONDS
from common.http.server import SWEEP_SECONDS, HttpServer
from common.http.turns import TURN_SECONDS, Turns
from tests.support.transport import FakeTransport

LIMITS = ServerLimits(
    request=Limits(),
    connections=3,
    pipelined=8,
    buffered_bytes=1_000_000,
    head_seconds=10.0,
    body_seconds=10.0,
    idle_seconds=5.0,
    write_seconds=20.0,
)
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
LATER = b"GET /later HTTP/1.1\r\nHost: h\r\n\r\n"


def upload(size: int, sent: int = 0) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (size, b"x" * sent)


class Server:
    """A server without sockets: its state, an application, and a clock."""

    def __init__(self, limits: ServerLimits = LIMITS) -> None:
        self.now = 1000.0
        self.soon: list[Callable[[], None]] = []
        self.waiting: list[Exchange] = []
        self.slow_seconds = 0.0
        self.state = ServerState(limits, self, lambda: self.now, Turns(self.soon.append, lambda: self.now))

    def check(self, head: Head) -> bytes:
        if head.path == b"/none":
            raise HttpError(404, "no such page")
        return b""

    def handle(self, request: Request, exchange: Exchange) -> None:
        self.now += self.slow_seconds
        if request.head.path == b"/later":
            self.waiting.append(exchange)
        else:
            exchange.answer(200, b"hello")

    def answered(self, exchange: Exchange, status: int) -> None:
        pass

    def connect(self) -> tuple[Connection, FakeTransport]:
        connection, transport = Connection(self.state), FakeTransport()
        connection.connection_made(transport)
        return connection, transport

    def lose(self, connection: Connection) -> None:
        connection.abort()
        connection.connection_lost(None)

    def fill(self) -> list[FakeTransport]:
        """Take all places with clients whose answers are due."""
        transports = []
        for _ in range(self.state.limits.connections):
            connection, transport = self.connect()
            connection.data_received(LATER)
            transports.append(transport)
        self.now += 3
        return transports

    def turn(self) -> None:
        soon, self.soon[:] = list(self.soon), []
        for call in soon:
            call()

    def run(self) -> None:
        while self.soon:
            self.turn()

    def sweep(self, seconds: float) -> None:
        self.now += seconds
        self.state.sweep()


@pytest.fixture
def server() -> Server:
    return Server()


def status(transport: FakeTransport) -> int:
    """Return the status of the last answer."""
    return int(bytes(transport.sent).rpartition(b"HTTP/1.1 ")[2][:3])


def test_phases_end_closed_and_only_answering_goes_back() -> None:
    for phase, following in NEXT.items():
        assert phase is CLOSED or CLOSED in following
        assert phase is Phase.ANSWERING or all(after > phase for after in following)


def test_an_idle_client_is_closed(server: Server) -> None:
    connection, transport = server.connect()
    connection.data_received(GET)
    server.sweep(4)
    assert not transport.closing
    server.sweep(2)
    assert transport.closing
    assert not transport.aborted


def test_an_idle_client_with_an_unread_answer_is_cut_off(server: Server) -> None:
    connection, transport = server.connect()
    connection.data_received(GET)
    transport.unsent = 100  # below the mark at which the transport would complain
    server.sweep(6)
    assert transport.aborted


def test_a_close_waits_for_the_client_to_read_not_forever(server: Server) -> None:
    connection, transport = server.connect()
    transport.unsent = 100
    connection.data_received(LAST_GET)
    assert transport.ended
    server.sweep(LINGER_SECONDS + 1)
    assert transport.closing
    server.sweep(19)
    assert not transport.aborted
    server.sweep(2)
    assert transport.aborted


def test_a_client_that_reads_slowly_is_not_cut_off() -> None:
    server = Server(replace(LIMITS, buffered_bytes=10_000_000))
    connection, transport = server.connect()
    connection.data_received(LATER)
    transport.unsent = 6_000_000
    connection.pause_writing()
    server.waiting.pop().answer(200, b"")
    while transport.unsent > 0:  # 60 KB/s
        transport.unsent -= 600_000
        server.sweep(10)
        assert not transport.aborted
    transport.unsent = 0
    connection.resume_writing()
    connection.data_received(GET)
    assert status(transport) == 200


@pytest.mark.parametrize("taken", [0, 100])
def test_a_client_that_takes_nothing_or_a_trickle_is_cut_off(server: Server, taken: int) -> None:
    connection, transport = server.connect()
    transport.unsent = 500_000
    connection.pause_writing()
    for _ in range(21):
        assert not transport.aborted
        transport.unsent -= taken
        server.sweep(1)
    assert transport.aborted


def test_answers_that_nobody_reads_are_bounded_over_all(server: Server) -> None:
    (first, transport), (second, second_transport) = server.connect(), server.connect()
    transport.unsent = 999_999
    first.pause_writing()
    assert not transport.aborted
    second_transport.unsent = 2
    second.pause_writing()
    assert second_transport.aborted
    server.lose(first)
    server.lose(second)
    assert server.state.pool.held_bytes == 0


def test_a_client_that_reads_nothing_has_nothing_more_handled(server: Server) -> None:
    connection, transport = server.connect()
    connection.data_received(LATER + GET * 50)
    transport.unsent = 100_000
    server.waiting.pop().answer(200, b"large")  # with the answers after it, as many as are handled at once
    connection.pause_writing()
    answers = bytes(transport.sent).count(b"HTTP/1.1 ")
    connection.data_received(GET * 50)
    server.run()
    assert bytes(transport.sent).count(b"HTTP/1.1 ") == answers
    transport.unsent = 0
    connection.resume_writing()
    server.run()
    assert bytes(transport.sent).count(b"HTTP/1.1 ") == 101


def test_a_steady_upload_is_not_timed_out(server: Server) -> None:
    connection, transport = server.connect()
    connection.data_received(upload(500_000))
    for _ in range(24):  # 20 KB/s for 24 s
        server.sweep(1)
        connection.data_received(b"x" * 20_000)
        assert not transport.sent
    connection.data_received(b"x" * 20_000)
    assert status(transport) == 200


def test_bytes_sent_at_once_buy_no_silence(server: Server) -> None:
    connection, transport = server.connect()
    connection.data_received(upload(800_001, 800_000))
    server.sweep(11)
    assert status(transport) == 408


def test_silence_and_a_trickle_are_bounded() -> None:
    assert after_progress(100.0, 1_000_000, 105.0) == 105.0
    assert after_progress(100.0, 16_000, 105.0) == 101.0


def test_the_newcomer_does_not_pay_for_a_stalled_client(server: Server) -> None:
    (small, _), (large, transport), (newcomer, new_transport) = server.connect(), server.connect(), server.connect()
    small.data_received(upload(500_000, 100_000))
    large.data_received(upload(900_000, 899_000))
    server.now += SILENT_SECONDS + 0.1
    newcomer.data_received(upload(600_000, 300_000))
    assert status(transport) == 503
    assert not new_transport.sent
    newcomer.data_received(b"x" * 300_000)
    assert status(new_transport) == 200


def test_without_a_stall_the_newcomer_is_refused(server: Server) -> None:
    (first, transport), (newcomer, new_transport) = server.connect(), server.connect()
    first.data_received(upload(900_000, 800_000))
    newcomer.data_received(upload(900_000, 300_000))
    assert status(new_transport) == 503
    assert not transport.sent


def test_at_the_limit_the_longest_idle_connection_leaves(server: Server) -> None:
    others = []
    for _ in range(3):
        others.append(server.connect())
        server.now += 1
    _, transport = server.connect()
    assert [each.closing for _, each in others] == [True, False, False]
    assert not transport.sent


def test_a_newcomer_without_a_place_gets_503_at_once(server: Server) -> None:
    """It can still send what it was about to: a number of refused clients are read for a while."""
    others = server.fill()
    crowd = [server.connect() for _ in range(MOST_LEAVING)]
    for connection, transport in crowd:
        assert bytes(transport.sent).count(b"HTTP/1.1 503 ") == bytes(transport.sent).count(b"Connection: close") == 1
        connection.data_received(GET)
    _, late_transport = server.connect()
    assert late_transport.closing
    assert not late_transport.sent
    assert not server.waiting[len(others) :]
    assert not any(each.closing for each in others)
    server.sweep(LINGER_SECONDS + 0.1)
    assert all(transport.closing for _, transport in crowd)


def test_a_free_place_is_given_to_the_next(server: Server) -> None:
    server.fill()
    refused, _ = server.connect()
    server.lose(next(each for each in server.state.pool.members if each is not refused))
    server.now += SILENT_SECONDS
    connection, transport = server.connect()
    connection.data_received(GET)
    assert status(transport) == 200
    assert not transport.closing


def test_a_refused_client_that_lingers_leaves_first(server: Server) -> None:
    (refused, transport), *others = [server.connect() for _ in range(3)]
    refused.data_received(b"POST /none HTTP/1.1\r\nHost: h\r\nContent-Length: 7000000\r\n\r\n")
    server.now += 3
    newcomer, new_transport = server.connect()
    newcomer.data_received(GET)
    assert status(new_transport) == 200
    assert not new_transport.closing
    assert transport.aborted
    assert not any(each.closing for _, each in others)


def test_half_a_head_loses_its_place_with_an_answer(server: Server) -> None:
    others = [server.connect() for _ in range(3)]
    for connection, _ in others:
        connection.data_received(GET[:3])
        server.now += 1
    newcomer, transport = server.connect()
    newcomer.data_received(GET)
    assert status(transport) == 200
    assert [bool(each.sent) for _, each in others] == [True, False, False]
    assert status(others[0][1]) == 408


def test_no_more_than_a_few_half_heads_stay_for_their_answer() -> None:
    """Each takes a descriptor, beside that of the newcomer who has its place."""
    places = MOST_LEAVING + 20
    server = Server(replace(LIMITS, connections=places))
    others = [server.connect() for _ in range(places)]
    for connection, _ in others:
        connection.data_received(GET[:3])
    server.now += SILENT_SECONDS
    for _ in range(places):
        server.connect()
        for connection, transport in others:
            if transport.aborted and connection.phase is not CLOSED:
                server.lose(connection)
        assert len(server.state.pool.members) <= places + MOST_LEAVING
    assert sum(bool(transport.sent) for _, transport in others) == MOST_LEAVING


def test_a_refused_upload_is_read_to_its_end(server: Server) -> None:
    """That holds however large it is: a reset would destroy the refusal."""
    connection, transport = server.connect()
    connection.data_received(b"POST /none HTTP/1.1\r\nHost: h\r\nContent-Length: 7000000\r\n\r\n")
    assert status(transport) == 404
    for _ in range(70):
        server.sweep(1)
        connection.data_received(b"x" * 100_000)
        assert not transport.closing
        assert transport.reading
    assert connection.held_bytes == 0
    server.sweep(6)
    assert transport.closing


def test_a_stop_waits_for_the_next_request_of_active_clients(server: Server) -> None:
    connection, transport = server.connect()
    _, idle = server.connect()
    server.now += LAST_REQUEST_SECONDS + 1
    connection.data_received(GET)
    server.state.drain()
    assert idle.closing
    assert not transport.closing
    connection.data_received(GET)
    assert bytes(transport.sent).count(b"Connection: close") == 1
    assert transport.ended


def test_a_stop_lets_a_body_come_in_and_bounds_silence(server: Server) -> None:
    (whole, transport), (half, half_transport) = server.connect(), server.connect()
    whole.data_received(upload(200_000, 100))
    half.data_received(upload(200_000, 100))
    server.state.drain()
    server.sweep(0.9)
    whole.data_received(b"x" * 199_000)
    server.sweep(0.9)
    whole.data_received(b"x" * 900)
    assert status(transport) == 200
    assert status(half_transport) == 503


def test_a_stop_ends_a_pipeline_with_connection_close(server: Server) -> None:
    """All that was handled is answered, however fast more comes. What comes after that is read and dropped."""
    connection, transport = server.connect()
    connection.data_received(LATER * 20 + GET[:5])
    server.state.drain()
    while server.waiting:
        server.waiting.pop(0).answer(200, b"")
        if transport.reading:
            connection.data_received(GET[5:] + GET * 9 + GET[:5])
    answers = bytes(transport.sent).split(b"HTTP/1.1 200 OK")[1:]
    assert len(answers) == LIMITS.pipelined
    assert [b"Connection: close" in each for each in answers] == [False] * 7 + [True]
    assert transport.ended
    assert not transport.closing
    connection.data_received(GET * 9)
    server.sweep(LAST_REQUEST_SECONDS + 0.1)
    assert transport.closing


def test_a_client_that_connects_during_a_stop_is_answered(server: Server) -> None:
    server.state.drain()
    connection, transport = server.connect()
    connection.data_received(GET)
    assert status(transport) == 200
    assert b"Connection: close" in transport.sent


def test_slow_pipelined_requests_give_the_loop_back(server: Server) -> None:
    server.slow_seconds = 0.003
    connection, transport = server.connect()
    connection.data_received(GET * 8)
    assert bytes(transport.sent).count(b"hello") == 1
    rounds = 0
    while server.soon:
        began = server.now
        server.turn()
        rounds += 1
        assert server.now - began < 0.01
    assert rounds >= 4
    assert bytes(transport.sent).count(b"hello") == 8
    assert transport.reading


def test_cheap_pipelined_requests_give_the_loop_back_too(server: Server) -> None:
    """Answers that free the pipeline do not begin a new slice."""
    server.slow_seconds = 0.0001
    connection, transport = server.connect()
    began = server.now
    connection.data_received(GET * 1000)
    assert server.now - began < 0.004
    while server.soon:
        began = server.now
        server.turn()
        assert server.now - began < 0.01
    assert bytes(transport.sent).count(b"hello") == 1000
    assert transport.reading


def test_an_exchange_is_answered_once(server: Server) -> None:
    connection, transport = server.connect()
    connection.data_received(LATER)
    exchange = server.waiting.pop()
    exchange.answer(200, b"")
    with pytest.raises(RuntimeError):
        exchange.answer(200, b"")
    assert bytes(transport.sent).count(b"HTTP/1.1") == 1


def test_a_phase_that_cannot_follow_is_a_bug(server: Server) -> None:
    connection, _ = server.connect()
    connection.data_received(LAST_GET)
    with pytest.raises(RuntimeError, match="LINGERING to IDLE"):
        connection._enter(IDLE, server.now)


def test_what_an_exchange_holds_counts_until_its_answer(server: Server) -> None:
    """That holds even if the client is gone by then: its request is still being worked on, and can hold more later."""
    for leaves in (False, True):
        connection, _ = server.connect()
        connection.data_received(LATER)
        exchange = server.waiting.pop()
        exchange.hold(600_000)
        if leaves:
            server.lose(connection)
        assert server.state.pool.held_bytes == 600_000
        exchange.hold(400_000)
        assert server.state.pool.held_bytes == 400_000
        exchange.answer(200, b"")
        assert server.state.pool.held_bytes == 0


def test_an_answer_after_one_that_is_due_counts_as_memory(server: Server) -> None:
    connection, _ = server.connect()
    connection.data_received(LATER + LATER)
    first, second = server.waiting
    second.hold(400_000)
    second.answer(200, b"")
    assert server.state.pool.held_bytes == 400_000
    first.answer(200, b"")
    assert server.state.pool.held_bytes == 0


def test_many_answers_at_once_give_the_loop_back() -> None:
    """One confirm can answer thousands, each with a request after it that costs less than a slice."""
    server = Server(replace(LIMITS, connections=100, pipelined=1))
    for _ in range(50):
        connection, _ = server.connect()
        connection.data_received(LATER + GET)
    server.slow_seconds, began, waiting = 0.001, server.now, list(server.waiting)
    for exchange in waiting:
        exchange.answer(200, b"")
    assert server.now - began < 3 * TURN_SECONDS
    server.run()
    assert server.now - began > 0.049


def test_a_client_that_waits_for_a_turn_is_not_stalled(server: Server) -> None:
    """The delay is ours, not the client's: its connection is not closed in favour of another."""
    (waiting, transport), (slow, _) = server.connect(), server.connect()
    server.slow_seconds = SILENT_SECONDS
    slow.data_received(GET)
    waiting.data_received(GET)
    server.now += SILENT_SECONDS + 0.1
    assert slow.silent_seconds(server.now) > SILENT_SECONDS
    assert not waiting.silent_seconds(server.now)
    server.turn()
    assert status(transport) == 200


def test_a_client_that_ends_after_an_empty_line_is_closed(server: Server) -> None:
    connection, transport = server.connect()
    server.state.turns.worked_since(server.now - 1)
    connection.data_received(b"\r\n")
    assert connection.eof_received(), "it waits for its turn"
    server.run()
    assert transport.closing


@pytest.mark.parametrize("pieces", [[b"\r\n"], [b"\r", b"\n"], [b"\r"]], ids=["at once", "in two", "the half"])
@pytest.mark.parametrize("slow", [0.0, 0.01], ids=["in one slice", "over a slice"])
def test_after_an_empty_line_a_client_is_idle(server: Server, pieces: list[bytes], slow: float) -> None:
    """It is closed after the idle time, without an answer to nothing."""
    server.slow_seconds = slow
    connection, transport = server.connect()
    connection.data_received(GET + pieces[0])
    for piece in pieces[1:]:
        connection.data_received(piece)
    server.run()
    assert connection.phase is IDLE
    server.sweep(4)
    assert not transport.closing
    server.sweep(2)
    assert transport.closing
    assert transport.sent.count(b"HTTP/1.1 ") == 1


async def test_a_late_sweep_takes_nobody_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients sent while the process did not run is not read yet, and comes first."""
    server = HttpServer(LIMITS, Server())
    sweeps: list[float] = []
    monkeypatch.setattr(server.state, "sweep", lambda: sweeps.append(1.0))
    now = asyncio.get_running_loop().time()
    server._sweep(now - SWEEP_SECONDS)
    assert not sweeps
    server._sweep(now)
    assert sweeps
    server.abort()
