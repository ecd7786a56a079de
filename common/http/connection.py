"""A client's connection (reading, answers in order, time-outs), and what the connections of a server share.

The grammar is in parser.py, the phases and their times in phases.py, the meaning of a request in the application.
No task, future or timer is made for a request: answers are callbacks, and one sweep checks all deadlines.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

from common.errors import HttpError
from common.http.exchange import Application, Exchange
from common.http.parser import Head, Limits, RequestParser
from common.http.phases import (
    ANSWERING,
    BODY,
    CLOSED,
    CLOSING,
    HEAD,
    IDLE,
    LAST,
    LINGERING,
    NEXT,
    Phase,
    granted,
    seconds_by_phase,
)
from common.http.response import CONTINUE

log = logging.getLogger("predlog.http")

# The work of one connection before others get their turn. What is left of its requests then waits.
SLICE_SECONDS = 0.002
# The work of all waiting connections in one round of the event loop. With the rest of a round it stays well below the
# 50 ms by which one client may delay another (docs/http.md).
TURN_SECONDS = 0.005
# A connection without progress for this long may be evicted in favour of another. A lost packet delays for less.
STALL_SECONDS = 1.0
# Finding the longest idle of 16,000 connections takes about 5 ms, too long to do for each new one.
IDLE_SCAN_SECONDS = 0.1
# Connections beyond the limit, of which only probes are answered: so many at once, each for this long and a sweep.
SPARE_CONNECTIONS = 64
SPARE_SECONDS = 1.0

# In favour of a newcomer, those go first that were refused and only linger.
_EVICTED = (LINGERING, IDLE, HEAD)
_CLIENTS_TURN = (IDLE, HEAD, BODY, LINGERING)

_TRY_AGAIN = (("Retry-After", "1"),)


def _too_many() -> HttpError:
    return HttpError(503, "too many connections", _TRY_AGAIN)


def _too_much() -> HttpError:
    return HttpError(503, "too many large requests at once; try again", _TRY_AGAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds on connections and time. Those on one request are in `parser.Limits`."""

    request: Limits
    connections: int
    buffered_bytes: int  # of incomplete requests and unread answers, over all connections
    idle_seconds: float  # proxies keep idle connections for 60 s; ours must last longer
    pipelined: int = 32  # unanswered requests of one connection; beyond it the connection is not read
    head_seconds: float = 10.0
    body_seconds: float = 20.0  # without progress, for uploads over mobile links that pause
    write_seconds: float = 20.0  # without progress


class ServerState:
    """The shared state of a server's connections: limits, clock, turns, and the bounds that they keep together."""

    def __init__(
        self,
        limits: ServerLimits,
        application: Application,
        now: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self.limits = limits
        self.application = application
        self.now = now
        self.date = b""
        self.connections: set[Connection] = set()
        self.spare: dict[Connection, float] = {}  # those beyond the limit, oldest first, and when they came
        self._spare_is_due = False  # to be bounded
        self.spare_request = replace(limits.request, keep_alive=False)
        self.check = application.check
        self.held_bytes = 0
        self.draining = False
        self.seconds = self._seconds()
        self._call_soon = call_soon
        self.turn_ends = math.inf  # the end of this round of the loop; inf while no connection takes long
        self._waiting: deque[Connection] = deque()  # for their turn; slow ones wait behind all others
        self._waiting_slow: deque[Connection] = deque()
        self._idlest: list[Connection] = []  # the longest idle last
        self._next_scan = 0.0

    def _seconds(self) -> tuple[float, ...]:
        limits = self.limits
        return seconds_by_phase(
            limits.head_seconds, limits.body_seconds, limits.idle_seconds, limits.write_seconds, self.draining
        )

    def drain(self) -> None:
        """End each connection with the next answer that leaves it idle."""
        self.draining = True
        self.seconds = self._seconds()
        for connection in list(self.connections):
            connection.drain()

    # Turns. Connections share a round of the event loop, so that one client delays the others by little.

    def took_long(self, began: float) -> None:
        """Note that a connection has worked since `began`, longer than its slice."""
        if self.turn_ends == math.inf:
            self.turn_ends = began + TURN_SECONDS
            self._call_soon(self._next_turn)

    def wait_for_turn(self, connection: Connection, slow: bool) -> None:
        (self._waiting_slow if slow else self._waiting).append(connection)
        self.took_long(self.now())

    def _next_turn(self) -> None:
        self.turn_ends = self.now() + TURN_SECONDS
        while waiting := self._waiting or self._waiting_slow:
            waiting.popleft().turn()
            if self.now() > self.turn_ends:
                self._call_soon(self._next_turn)
                return
        self.turn_ends = math.inf

    # Bounds over all connections

    def has_memory(self) -> bool:
        """Tell whether all connections together hold no more than they may.

        First free what connections without progress hold, the largest first.
        """
        if self.held_bytes <= self.limits.buffered_bytes:
            return True
        now = self.now()
        stalled = [each for each in self.connections if each.held_bytes and each.is_stalled(now)]
        stalled.sort(key=lambda each: each.held_bytes)
        while stalled and self.held_bytes > self.limits.buffered_bytes:
            stalled.pop().give_up_memory()
        return self.held_bytes <= self.limits.buffered_bytes

    def require_memory(self) -> None:
        """Raise HttpError 503 when all connections together hold too much."""
        if not self.has_memory():
            raise _too_much()

    def has_place(self) -> bool:
        """Tell whether one more connection is within the limit, after closing the longest idle one if need be."""
        return len(self.connections) - len(self.spare) < self.limits.connections or self._evict_idle()

    def add_spare(self, connection: Connection) -> None:
        """Admit a connection beyond the limit. The oldest of these make room, once what came with them is read."""
        self.spare[connection] = self.now()
        if len(self.spare) > SPARE_CONNECTIONS and not self._spare_is_due:
            self._spare_is_due = True
            self._call_soon(self._bound_spare)

    def _bound_spare(self) -> None:
        self._spare_is_due = False
        for connection in list(self.spare)[: max(0, len(self.spare) - SPARE_CONNECTIONS)]:
            connection.cut_short()

    def check_spare(self, head: Head) -> bytes:
        """Check a request beyond the limit. Raise HttpError 503 unless it is a probe."""
        if head.content_length or head.chunked or not self.application.is_probe(head):
            raise _too_many()
        return self.check(head)

    def sweep(self) -> None:
        """Act on every deadline that has passed."""
        now = self.now()
        for connection in list(self.connections):
            connection.sweep(now)
        for connection, came in list(self.spare.items()):
            if now - came > SPARE_SECONDS:
                connection.cut_short()

    def _evict_idle(self) -> bool:
        """Close the longest idle connection, if one has been idle for STALL_SECONDS. Tell whether one was closed."""
        now = self.now()
        if not self._idlest and now >= self._next_scan:
            self._next_scan = now + IDLE_SCAN_SECONDS
            found = [
                each
                for each in self.connections
                if each.phase in _EVICTED and each.is_stalled(now) and each not in self.spare
            ]
            found.sort(key=lambda each: (_EVICTED.index(each.phase), each.deadline), reverse=True)
            self._idlest = found[-1000:]
        while self._idlest:
            connection = self._idlest.pop()
            if connection.phase in _EVICTED and connection.is_stalled(now):
                connection.evict()
                if connection.phase is LINGERING:
                    self.add_spare(connection)
                return True
        return False


class Connection(asyncio.Protocol):
    """The connection of one client."""

    __slots__ = (
        "_check",
        "_eof",
        "_fields",
        "_parser",
        "_pumping",
        "_reading",
        "_slow",
        "_unsent",
        "_waiting",
        "deadline",
        "exchanges",
        "held_bytes",
        "phase",
        "state",
        "stuck",
        "transport",
    )

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.transport: asyncio.Transport | None = None
        self.phase = IDLE
        self.deadline = math.inf  # of the phase; of the client's reading while it is stuck
        self.exchanges: deque[Exchange] = deque()  # whose answers are due, in order
        self.stuck = False  # while the client does not read its answers
        self.held_bytes = 0  # of the incomplete request and of unsent answers; counted in state.held_bytes
        self._unsent = 0  # bytes that the client had not taken at the last look, while it is stuck or closing
        self._parser = RequestParser(state.limits.request)
        self._check = state.check
        self._fields = b""  # what `check` returned for a head whose body is still arriving
        self._reading = True
        self._eof = False
        self._pumping = False
        self._waiting = False  # for its turn
        self._slow = False  # its last requests took longer than a slice

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        state = self.state
        self.deadline = state.now() + state.seconds[IDLE]
        if not state.has_place():
            state.add_spare(self)
            self._parser = RequestParser(state.spare_request)
            self._check = state.check_spare
        state.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.exchanges.clear()
        self.phase = CLOSED
        self.state.held_bytes -= self.held_bytes
        self.held_bytes = 0
        self.state.connections.discard(self)
        self.state.spare.pop(self, None)

    def _enter(self, phase: Phase) -> None:
        if phase not in NEXT[self.phase]:
            raise RuntimeError(f"a bug: {self.phase.name} to {phase.name}")
        self.phase = phase
        if not self.stuck or phase >= LINGERING:
            self.deadline = self.state.now() + self.state.seconds[phase]

    # What comes in

    def data_received(self, data: bytes) -> None:
        phase, state = self.phase, self.state
        if phase is BODY or phase is LINGERING:
            self.deadline = granted(self.deadline, len(data), state.now(), state.seconds[phase])
        if phase < LAST:
            self._parser.receive_data(data)
            if state.turn_ends != math.inf and state.now() > state.turn_ends:
                self._wait_for_turn()
            else:
                self._pump()
        elif phase is LAST:
            self._parser.receive_data(data)  # only to know that more has come

    def eof_received(self) -> bool:
        # A client that half-closes has sent its last request and still gets its answers.
        self._eof = True
        if self.transport is None or self.transport.get_extra_info("sslcontext") is not None:
            return False  # asyncio has no half-closed TLS
        return bool(self.exchanges) or self._waiting

    def turn(self) -> None:
        """Continue with requests that had to wait for a turn."""
        self._waiting = self._slow = False
        if self.transport is not None and self.phase < LAST:
            if not self.stuck:
                self.deadline = self.state.now() + self.state.seconds[self.phase]
            self._set_reading(len(self.exchanges) < self.state.limits.pipelined)
            self._pump()

    def _wait_for_turn(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._set_reading(False)
            self.state.wait_for_turn(self, self._slow)

    def _pump(self) -> None:
        """Handle all that has arrived, up to the pipeline's depth, and write the answers that are due."""
        if self._pumping or self._waiting:
            return
        self._pumping = True
        try:
            more = True
            began = 0.0
            while more:
                try:
                    began = self._handle_requests(began)
                except HttpError as error:
                    error.__traceback__ = None
                    self._refuse(error)
                if self.held_bytes or not self._parser.idle:
                    self._account()
                exchanges = self.exchanges
                more = bool(exchanges) and exchanges[0].response is not None and self._write_answers()
        finally:
            self._pumping = False

    def _handle_requests(self, began: float) -> float:
        """Handle requests up to the pipeline's depth, or to the end of the slice. Return when the slice began."""
        parser, state, exchanges = self._parser, self.state, self.exchanges
        application, now = state.application, state.now
        while len(exchanges) < state.limits.pipelined and self.phase < LAST:
            request = parser.next_request()
            if request is None:
                if parser.has_more:
                    self._slow = True
                    self._wait_for_turn()
                else:
                    self._wait_for_more()
                return began
            head = request.head
            exchange = Exchange(self, head, now())
            exchanges.append(exchange)
            checked = self.phase is BODY
            if exchange.close:
                self._enter(LAST)
            else:
                self.phase = ANSWERING  # from any phase before LAST
                if not self.stuck:
                    self.deadline = math.inf
            try:
                exchange.fields = self._fields if checked else self._check(head)
                application.handle(request, exchange)
            except HttpError as error:
                # Its frames hold the request; with a frame that holds the error it is a cycle: memory until a gc.
                error.__traceback__ = None
                exchange.fail(error)
            except Exception:
                log.exception("a bug: %s %s", head.method.decode(), head.target.decode())
                if exchange.response is None:
                    exchange.fail(HttpError(500, "internal error; the log has the details"))
            began = began or exchange.began
            if now() - began > SLICE_SECONDS:
                self._slow = True
                state.took_long(began)
                if not parser.idle:
                    self._wait_for_turn()
                return began
            if parser.idle:
                return began
        self._set_reading(False)
        return began

    def _wait_for_more(self) -> None:
        """Enter the phase of an incomplete request, once all requests before it are answered."""
        parser = self._parser
        if parser.idle or self.exchanges:
            return
        head = parser.head
        if head is None:
            if self.phase is not HEAD:
                self._enter(HEAD)
        elif self.phase is not BODY:
            # A request is refused before its body is read, and before 100 Continue invites the body.
            self._fields = self._check_early(head)
            self._enter(BODY)
            if head.expect_continue and not parser.buffered_bytes and self.transport is not None:
                self.transport.write(CONTINUE)
        if self._eof:
            self._close()

    def _check_early(self, head: Head) -> bytes:
        try:
            return self._check(head)
        except HttpError:
            raise
        except Exception:
            log.exception("a bug: %s %s", head.method.decode(), head.target.decode())
            raise HttpError(500, "internal error; the log has the details") from None

    def _refuse(self, error: HttpError) -> None:
        """Refuse what cannot be read, after the answers still due, and close then."""
        self.exchanges.append(exchange := Exchange(self, self._parser.head, self.state.now(), refused=True))
        self._enter(LAST)
        exchange.fail(error)

    # What goes out

    def ends_with(self, exchange: Exchange) -> bool:
        """Tell whether this is the last answer of a draining connection, so that it can say `Connection: close`."""
        if self.phase is ANSWERING and self.exchanges[-1] is exchange and self._parser.idle:
            self._enter(LAST)
            return True
        return False

    def flush(self) -> None:
        """Write the answers that are due. Called after each answer."""
        if not self._pumping and self._write_answers():
            self._pump()

    def _write_answers(self) -> bool:
        """Write the answers that are due, in the order of their requests. Tell whether there may be more to handle."""
        transport, exchanges = self.transport, self.exchanges
        if transport is None or not exchanges or exchanges[0].response is None or transport.is_closing():
            return False
        answers: list[bytes] = []
        while exchanges and (response := exchanges[0].response) is not None:
            exchange = exchanges.popleft()
            answers += response
            if exchange.close:
                exchanges.clear()
                break
        if self.stuck:
            self._note_taken(transport.get_write_buffer_size())
        if len(answers) == 1:
            transport.write(answers[0])
        else:
            transport.writelines(answers)
        if self.stuck:
            self._unsent = transport.get_write_buffer_size()
            self._account()
        if exchange.close:
            if not transport.is_closing():
                self._finish(polite=not exchange.refused and self._parser.idle)
            return False
        if exchanges:
            more = False
        elif self._parser.idle:
            if self._eof:
                self._close()
                return False
            more = False
            self.phase = IDLE  # from ANSWERING; as _enter does
            if not self.stuck:
                self.deadline = self.state.now() + self.state.seconds[0]
        else:
            more = not self._waiting
        if not self._reading and not self.stuck and not self._waiting:
            self._set_reading(True)
            return True
        return more

    def _finish(self, polite: bool) -> None:
        """Close the connection after its last answer.

        If the client may still be sending, close only our side first, and read and drop what comes: a reset would
        destroy the answer on its way (RFC 9112 section 9.6).
        """
        transport = self.transport
        assert transport is not None
        if polite or self._eof:
            self._close()
            return
        self._enter(LINGERING)
        self._parser = RequestParser(self.state.limits.request)
        self._account()
        if transport.can_write_eof():
            transport.write_eof()  # without it (TLS in asyncio) the client closes, or LINGER_SECONDS end the connection
        self._set_reading(True)

    def _close(self) -> None:
        assert self.transport is not None
        self._enter(CLOSING)
        self._unsent = self.transport.get_write_buffer_size()
        self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _set_reading(self, on: bool) -> None:
        if on == self._reading or self.transport is None or self.transport.is_closing():
            return
        self._reading = on
        if on:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self.stuck = True
        self._unsent = self.transport.get_write_buffer_size() if self.transport is not None else 0
        self.deadline = self.state.now() + self.state.limits.write_seconds
        if self.phase is not LINGERING:
            self._set_reading(False)

    def resume_writing(self) -> None:
        self.stuck = False
        self._unsent = 0
        self.deadline = self.state.now() + self.state.seconds[self.phase]
        self._account()
        if len(self.exchanges) < self.state.limits.pipelined and self.phase < LAST and not self._waiting:
            self._set_reading(True)
            self._pump()

    # Memory

    def _account(self) -> None:
        """Update the memory that all connections hold, and keep it within its bound."""
        held_bytes = self._parser.buffered_bytes + (self._unsent if self.stuck else 0)
        more = held_bytes - self.held_bytes
        if not more:
            return
        state = self.state
        state.held_bytes += more
        self.held_bytes = held_bytes
        if more > 0 and not state.has_memory() and held_bytes == self.held_bytes:
            self.give_up_memory()

    def is_stalled(self, now: float) -> bool:
        """Tell whether the client has neither sent nor taken anything for STALL_SECONDS, although it is its turn."""
        if self._waiting:
            return False
        if self.stuck:
            return self.deadline - self.state.limits.write_seconds <= now - STALL_SECONDS
        return self.phase in _CLIENTS_TURN and self.deadline - self.state.seconds[self.phase] <= now - STALL_SECONDS

    def give_up_memory(self) -> None:
        """Free what is held. A client that reads its answers gets 503; any other is cut off."""
        if self.stuck or self.phase >= LAST:
            self.abort()
        else:
            self._refuse(_too_much())

    # Time

    def _note_taken(self, unsent: int) -> None:
        """Grant time for what the client has taken since the last call."""
        taken = self._unsent - unsent
        self._unsent = unsent
        if taken > 0:
            self.deadline = granted(self.deadline, taken, self.state.now(), self.state.limits.write_seconds)

    def sweep(self, now: float) -> None:
        """Act on a deadline that has passed."""
        transport = self.transport
        if transport is None:
            return
        if self.stuck or self.phase is CLOSING:
            self._note_taken(transport.get_write_buffer_size())
            self._account()
        if now <= self.deadline or self._waiting:
            return
        if self.stuck or self.phase >= LINGERING:
            self.abort()
        elif self.phase is IDLE:
            self.evict()
        elif self.state.draining:
            self._refuse(HttpError(503, "the server is shutting down; try again", _TRY_AGAIN))
        elif self.phase is HEAD:
            self._refuse(HttpError(408, "the header section did not arrive in time"))
        else:
            self._refuse(HttpError(408, "the body did not arrive in time"))

    def evict(self) -> None:
        """Close an idle connection. A client that never took its last answer loses it."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self.phase is HEAD:
            self._refuse(HttpError(408, "the header section did not arrive in time"))
        elif self.phase is LINGERING or transport.get_write_buffer_size():
            self.abort()
        else:
            self._close()

    def cut_short(self) -> None:
        """Close a connection beyond the limit, with an answer if it had none."""
        if self.phase >= LAST:
            self.abort()
            return
        self._refuse(_too_many())
        if self.phase is LINGERING:
            self._close()

    def drain(self) -> None:
        """End with the next answer, or when no request comes within LAST_REQUEST_SECONDS of the last answer."""
        state, phase = self.state, self.phase
        if self.stuck or phase is CLOSING:
            return
        if phase is IDLE:
            self.deadline += state.seconds[IDLE] - state.limits.idle_seconds
        else:
            self.deadline = min(self.deadline, state.now() + state.seconds[phase])
        self.sweep(state.now())
