"""A client's connection: requests out of what arrives, their answers in order, and time-outs.

The grammar is in parser.py, the phases and their times in phases.py, the output in writer.py, the bounds over all
connections in pool.py, the meaning of a request in the application. No task, future or timer is made for a request:
answers are callbacks, and one sweep checks all deadlines.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable
from math import inf
from typing import cast

from common.errors import HttpError
from common.http.exchange import Application, Exchange
from common.http.parser import Request, RequestParser
from common.http.phases import (
    ANSWERING,
    BODY,
    CLOSED,
    CLOSING,
    HANDSHAKE,
    HEAD,
    IDLE,
    LAST,
    LINGERING,
    NEXT,
    Phase,
    ServerLimits,
    after_progress,
    seconds_by_phase,
)
from common.http.pool import Pool
from common.http.tls import FORGIVEN_BYTES, Tls
from common.http.turns import Job, Turns
from common.http.writer import Writer

log = logging.getLogger("predlog.http")

# How long one connection works before others get their turn. What is left of its requests then waits.
SLICE_SECONDS = 0.002
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_CLIENTS_TURN = frozenset({HANDSHAKE, IDLE, HEAD, BODY, LINGERING})
_TRY_AGAIN = (("Retry-After", "1"),)
_TOO_MUCH = "too many large requests at once; try again"


class ServerState:
    """What the connections of a server share."""

    def __init__(self, limits: ServerLimits, application: Application, now: Callable[[], float], turns: Turns) -> None:
        self.limits = limits
        self.application = application
        self.now = now
        self.turns = turns
        self.date = b""  # now, as the value of a Date field
        self.pool: Pool[Connection] = Pool(limits.connections, limits.buffered_bytes)
        self.draining = False
        self.seconds = seconds_by_phase(limits, draining=False)

    def drain(self) -> None:
        """End each connection with the last answer that is due, or with the next one if none is."""
        self.draining = True
        self.seconds = seconds_by_phase(self.limits, draining=True)
        for connection in self.pool.members:
            connection.drain()
        self.sweep()

    def sweep(self) -> None:
        """Act on every time-out."""
        now = self.now()
        for connection in list(self.pool.members):
            connection.sweep(now)


class Connection(asyncio.Protocol):
    """The connection of one client, within TLS if `tls` is given."""

    _transport: asyncio.Transport  # set when it is connected, as is the writer
    _writer: Writer

    def __init__(self, state: ServerState, tls: Tls | None = None) -> None:
        self.state = state
        self.application = state.application
        self.now = state.now
        self.phase = IDLE if tls is None else HANDSHAKE
        self.since = 0.0  # when the phase began, or later by the client's progress
        self.held_bytes = 0  # of the handshake, the incomplete request and unsent answers; counted by the pool
        self._tls = tls
        self._due: deque[Exchange] = deque()  # whose answers are due, in order
        self._parser = RequestParser(state.limits.request)
        self._fields = b""  # what `check` returned for a head whose body is still arriving
        self._reading = True
        self._eof = False
        self._pumping = False
        self._waiting = False  # for its turn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        state = self.state
        self._writer = Writer(self._transport, self._tls)
        self.since = now = state.now()
        leaver = state.pool.join(self, now)
        if leaver is self and self.phase is IDLE and state.pool.can_answer_refused():
            self._refuse(HttpError(503, "too many connections", _TRY_AGAIN))
        elif leaver is not None:
            leaver.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(CLOSED, self.now())
        self.state.pool.leave(self)  # what its requests hold counts until they are answered

    def _enter(self, phase: Phase, now: float) -> None:
        if phase not in NEXT[self.phase]:
            raise RuntimeError(f"a bug: {self.phase.name} to {phase.name}")
        self.phase = phase
        self.since = now

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._tls is not None and not (data := self._decrypt(self._tls, data)):
            return
        phase, state = self.phase, self.state
        if phase is not IDLE:
            if phase is BODY or (phase is LINGERING and not state.draining):
                self.since = after_progress(self.since, len(data), state.now())
            if phase >= LAST:
                return  # and drop it
        self._parser.receive_data(data)
        ends = state.turns.ends
        if not self._waiting and ((ends < inf and state.now() > ends) or self._pump()):
            self._wait_for_turn()

    def _decrypt(self, tls: Tls, data: bytes) -> bytes:
        """Return what a client has sent within TLS: nothing while its handshake lasts, or once our side is closed."""
        if self.phase >= LINGERING:
            return data  # which is dropped
        if self.phase is HANDSHAKE:
            tls.receive(data)
            self._account()
            self.state.turns.add(self, self._shake_hands(tls))
            return b""
        try:
            data, ended = tls.decrypt(data)
        except ssl.SSLError:
            self.abort()
            return b""
        if reply := tls.outgoing():  # to a change of keys
            self._transport.write(reply)
        if ended and not self.eof_received() and not data:
            self._close()
        return data

    def _shake_hands(self, tls: Tls) -> Job:
        if self.phase is not HANDSHAKE or self._transport.is_closing():
            return
        try:
            is_over = tls.shake_hands()
            self._transport.write(tls.outgoing())
        except ssl.SSLError:  # not TLS, or no common version: the client gets an alert
            self._transport.write(tls.outgoing())
            self._transport.close()
            return
        yield None
        if is_over and self.phase is HANDSHAKE:
            self._account()
            self._enter(IDLE, self.now())
            self.data_received(b"")  # what came with the end of the handshake

    def eof_received(self) -> bool:
        # A client that half-closes has sent its last request and still gets its answers.
        self._eof = True
        return bool(self._due) or self._waiting

    def _wait_for_turn(self) -> None:
        self._waiting = True
        self._account()
        self._update_reading()
        self.state.turns.add(self, self._take_turns())

    def _take_turns(self) -> Job:
        """Continue with requests that had to wait for a turn."""
        while self._pump():
            yield None
        self._waiting = False
        self.since = self.now()
        self._update_reading()

    def _pump(self) -> bool:
        """Handle what has arrived and write the answers that are due. Return whether the rest must wait for a turn."""
        parser, due, now = self._parser, self._due, self.now
        at = now()
        slice_ends = at + SLICE_SECONDS
        self._pumping = True
        while True:
            while len(due) < self.state.limits.pipelined and self.phase < LAST and not self._writer.stuck:
                try:
                    request = parser.next_request()
                    if request is None:
                        self._await_rest()
                        break
                except HttpError as error:
                    self._refuse(error)
                    break
                self._handle(request, at)
                at = now()
                if parser.idle or at > slice_ends:
                    break
            more = due and due[0].response is not None and self._write_answers()
            if not more or at > slice_ends:
                break
        self._pumping = False
        if self.held_bytes or not self._parser.idle or not self._reading:
            self._account()
            self._update_reading()
        if at <= slice_ends:
            return False
        self.state.turns.worked_since(slice_ends - SLICE_SECONDS)
        return self.phase < LAST and not self._parser.idle

    def _handle(self, request: Request, now: float) -> None:
        head = request.head
        exchange = Exchange(self, head, now)
        was_checked = self.phase is BODY
        if self.state.draining:
            exchange.close = True
        self._enter(LAST if exchange.close else ANSWERING, now)
        self._due.append(exchange)
        if self._tls is not None:
            self._tls.excess_bytes = max(0, self._tls.excess_bytes - FORGIVEN_BYTES)
        application = self.application
        try:
            exchange.fields = self._fields if was_checked else application.check(head)
            application.handle(request, exchange)
        except HttpError as error:
            exchange.fail(error)
        except Exception:
            log.exception("a bug: %s %s", head.method.decode(), head.target.decode())
            if exchange.response is None:
                exchange.fail(HttpError(500, "internal error; the log has the details"))

    def _await_rest(self) -> None:
        """Enter the phase of an incomplete request, once all requests before it are answered. Raise HttpError."""
        parser, phase = self._parser, self.phase
        if self._due:
            return
        head = parser.head
        if head is None:
            if parser.begins_no_request():  # only empty lines have come
                if phase is ANSWERING:
                    self._enter(IDLE, self.now())
            elif phase is not HEAD:
                self._enter(HEAD, self.now())
        elif phase is not BODY:
            # A request is refused before its body is read, and before 100 Continue invites the body.
            self._fields = self.application.check(head)
            self._enter(BODY, self.now())
            if head.expect_continue and not parser.buffered_bytes:
                self._writer.write((CONTINUE,))
        if self._eof:
            self._close()

    def _refuse(self, error: HttpError) -> None:
        """Refuse what cannot be read, after the answers that are still due, and then close."""
        now = self.now()
        exchange = Exchange(self, self._parser.head, now, refused=True)
        self._due.append(exchange)
        self._enter(LAST, now)
        self._parser = RequestParser(self.state.limits.request)
        self._account()
        exchange.fail(error)

    def _update_reading(self) -> None:
        """Read unless the client has sent enough for now. After its last request, read and drop what comes."""
        writer, transport = self._writer, self._transport
        is_enough = writer.stuck or self._waiting or len(self._due) >= self.state.limits.pipelined
        reading = self.phase >= LAST or not is_enough
        if reading != self._reading and not transport.is_closing():
            self._reading = reading
            if reading:
                transport.resume_reading()
            else:
                transport.pause_reading()

    # What goes out

    def flush(self) -> None:
        """Write the answers that are due. Called after each answer."""
        if not self._pumping and self._write_answers() and not self._waiting:
            turns = self.state.turns
            turns.worked_since(self.now())  # one confirm can answer thousands, each with a request after it
            if self.now() > turns.ends or self._pump():
                self._wait_for_turn()

    def _write_answers(self) -> bool:
        """Write the answers that are due. Return whether there can be more to handle."""
        due = self._due
        parts: tuple[bytes, ...] = ()
        while due and due[0].response is not None:
            exchange = due.popleft()
            parts += exchange.encode(self.state.date)
            if exchange.close:
                due.clear()
        if not parts or self._transport.is_closing():
            return False
        self._writer.write(parts)
        if exchange.close:
            self._finish()
            return False
        if not self._parser.idle:
            return True
        if not due:
            if self._eof:
                self._close()
                return False
            self._enter(IDLE, self.now())
        return not self._reading

    def _finish(self) -> None:
        """Close our side after the last answer, and drop what the client still sends.

        A reset would destroy the answer on its way (RFC 9112 section 9.6).
        """
        if self._eof:
            self._close()
            return
        self._enter(LINGERING, self.now())
        self._parser = RequestParser(self.state.limits.request)
        self._account()
        self._writer.end(close=False)
        self._update_reading()

    def _close(self) -> None:
        now = self.now()
        self._enter(CLOSING, now)
        self._writer.time_client(now)
        self._writer.end(close=True)

    def drain(self) -> None:
        """End the connection with the last of the answers that are due."""
        if self.phase is ANSWERING and self._due:
            self._due[-1].close = True
            self._enter(LAST, self.now())

    def abort(self) -> None:
        self._transport.abort()

    def pause_writing(self) -> None:
        self._writer.stuck = True
        self._writer.time_client(self.now())
        self._account()
        self._update_reading()

    def resume_writing(self) -> None:
        self._writer.stuck = False
        self._writer.unsent_bytes = 0
        self._account()
        self.since = self.now()
        if not self._waiting and self._pump():
            self._wait_for_turn()
        self._update_reading()

    # Memory

    def hold(self, more_bytes: int) -> None:
        """Count memory that a request holds. Raise HttpError 503 when all connections together hold too much."""
        pool = self.state.pool
        pool.held_bytes += more_bytes
        if more_bytes > 0:
            for connection in pool.over_memory(self, self.now()):
                if connection is self:
                    raise HttpError(503, _TOO_MUCH, _TRY_AGAIN)
                connection._give_up_memory()

    def _account(self) -> None:
        """Update what is held, and give it up if all connections together hold too much."""
        if self.phase is CLOSED:
            return
        tls_bytes = 0 if self._tls is None else self._tls.held_bytes
        held_bytes = self._parser.buffered_bytes + self._writer.unsent_bytes + tls_bytes
        more_bytes = held_bytes - self.held_bytes
        self.held_bytes = held_bytes
        try:
            self.hold(more_bytes)
        except HttpError:
            self._give_up_memory()

    def _give_up_memory(self) -> None:
        """Free what is held. A client that reads its answers gets 503; any other is cut off."""
        if self._writer.stuck or self.phase >= LAST or self.phase is HANDSHAKE:
            self.abort()
        else:
            self._refuse(HttpError(503, _TOO_MUCH, _TRY_AGAIN))

    # Time

    def silent_seconds(self, now: float) -> float:
        """Return for how long the client has neither sent nor taken anything; 0 while it is not the client's turn."""
        if self._writer.stuck:
            return now - self._writer.since
        return 0.0 if self._waiting or self.phase not in _CLIENTS_TURN else now - self.since

    def sweep(self, now: float) -> None:
        phase, writer, state = self.phase, self._writer, self.state
        if writer.stuck or phase is CLOSING:
            writer.look(now)
            self._account()
            if now - writer.since > state.limits.write_seconds:
                self.abort()
        elif now - self.since <= state.seconds[phase] or self._waiting:
            return
        elif state.draining and phase in (HEAD, BODY):
            self._refuse(HttpError(503, "the server is shutting down; try again", _TRY_AGAIN))
        elif phase is BODY:
            self._refuse(HttpError(408, "the body did not arrive in time"))
        elif phase is LINGERING:
            self._close()
        else:
            self.leave()

    def leave(self) -> None:
        """Close a connection without a request. A client that never took its last answer loses that answer."""
        if self.phase is HEAD and self.state.pool.can_answer_refused():
            self._refuse(HttpError(408, "the header section did not arrive in time"))
        elif self.phase is IDLE and not self._transport.get_write_buffer_size():
            self._close()
        else:
            self.abort()
