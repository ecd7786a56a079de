"""HTTP connections: reading, answers in order, time-outs, limits, drain.

The grammar is parser's; what a request means is the application's, which answers an exchange now or later.

No task, future or timer is made for a request: answers are callbacks, and one sweep a second looks after all time-outs.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import ssl
import time
from collections import deque
from dataclasses import dataclass
from email.utils import formatdate
from typing import Protocol, cast

from common.errors import HttpError, StartupError
from common.http.parser import Head, Limits, Request, RequestParser
from common.http.response import CONTINUE, encode_response

log = logging.getLogger("predlog.http")

JSON = b"application/json"
# How long a refused client may finish talking, and how much beyond the largest body: so that its kernel does not drop
# our answer, and a client that reads only when all is sent gets it.
LINGER_SECONDS = 5.0
LINGER_BYTES = 1 << 20
DRAINED_LINGER_SECONDS = 1.0
SLOWEST_BODY_BYTES_PER_SECOND = 16_000
HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on connections and time; parser.Limits has those on one request."""

    request: Limits
    connections: int
    pipelined: int  # requests of one connection under way; beyond it we stop reading that connection
    buffered_bytes: int  # of requests that are not complete, all connections together
    head_seconds: float
    body_seconds: float
    idle_seconds: float
    write_seconds: float


class Application(Protocol):
    """What requests mean. The server calls it from the event loop; it must not block."""

    def check(self, head: Head) -> None:
        """Raise HttpError for what the head alone condemns.

        Called once a request, before `handle`, and before the body is read if it is still to come.
        """

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer the exchange, now or later, or raise HttpError."""

    def answered(self, exchange: Exchange, status: int) -> None:
        """Take note of an answer: the application's own, or a refusal by the server (`exchange.refused`)."""


class Exchange:
    """One request and its answer, which may come at any time, once."""

    __slots__ = ("_connection", "began", "close", "head", "refused", "response")

    def __init__(self, connection: Connection, head: Head | None, began: float, refused: bool = False) -> None:
        self._connection = connection
        self.head = head  # None: it could not be read
        self.began = began
        self.refused = refused  # before the request was complete
        self.close = head is None or refused or not head.keep_alive
        self.response: bytes | None = None

    def answer(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Answer; `extra` is whole header lines, each with its CRLF. An answer to a client that left goes nowhere.

        Raises RuntimeError when there is an answer already.
        """
        if self.response is not None:
            raise RuntimeError("an exchange is answered once")
        connection = self._connection
        server = connection.server
        if server.draining and connection.exchanges and connection.exchanges[-1] is self:  # the last one, not any
            self.close = True
        head = self.head
        self.response = encode_response(
            status,
            body,
            content_type,
            server.date,
            extra,
            keep_alive=not self.close,
            head_only=head is not None and head.method == b"HEAD",
            http10=head is not None and head.http10,
        )
        server.application.answered(self, status)
        connection.flush()

    def fail(self, error: HttpError) -> None:
        """Answer with an error, in the contract's shape."""
        body = json.dumps({"detail": error.detail}, ensure_ascii=False, separators=(",", ":")).encode()
        extra = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in error.headers)
        self.answer(error.status, body, extra=extra)

    def seconds(self) -> float:
        """The time since the request was complete."""
        return self._connection.server.now() - self.began


class Connection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_accounted",
        "_checked",
        "_drained",
        "_eof",
        "_lingering",
        "_parser",
        "_partial",
        "_pumping",
        "_reading",
        "_since",
        "_stuck_since",
        "_unsent",
        "exchanges",
        "server",
        "transport",
    )

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.transport: asyncio.Transport | None = None
        self.exchanges: deque[Exchange] = deque()
        self._parser = RequestParser(server.limits.request)
        self._since = 0.0  # when the present phase (idle, or a partial request) began
        self._partial = False
        self._checked = False  # the head whose body is still arriving has passed the server's `check`
        self._stuck_since: float | None = None  # the client does not read its answers
        self._lingering: float | None = None  # we have said our last; until this time the client may finish
        self._drained = 0
        self._accounted = 0
        self._unsent = 0  # bytes of answers that the client does not read, while it is stuck
        self._pumping = False
        self._reading = True
        self._eof = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        server = self.server
        server.connections.add(self)
        self._since = server.now()
        if server.draining:
            self.transport.close()
        elif len(server.connections) > server.limits.connections:
            self._refuse(HttpError(503, "too many connections", (("Retry-After", "1"),)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.exchanges.clear()
        self._account(0)
        self._account_unsent(0)
        self.server.connection_closed(self)

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._drained += len(data)
            if self._drained > self.server.limits.request.body_bytes + LINGER_BYTES and self.transport is not None:
                self.transport.abort()
            return
        self._parser.receive_data(data)
        self._pump()

    def eof_received(self) -> bool:
        # A half-close is a client's way to say that this was its last request: it still gets its answers.
        self._eof = True
        if self.transport is None or self.transport.get_extra_info("sslcontext") is not None:
            return False  # asyncio has no half-closed TLS
        return bool(self.exchanges)

    def _pump(self) -> None:
        """Handle all that has arrived, up to the pipeline's depth, and write the answers that are due."""
        if self._pumping:
            return
        self._pumping = True
        try:
            going_on = True
            while going_on:
                try:
                    self._handle_requests()
                except HttpError as error:
                    error.__traceback__ = None
                    self._refuse(error)
                if self._accounted or not self._parser.idle:
                    self._account(self._parser.buffered_bytes)
                exchanges = self.exchanges
                going_on = bool(exchanges) and exchanges[0].response is not None and self._write_answers()
        finally:
            self._pumping = False

    def flush(self) -> None:
        """Write the answers that are due; called whenever one has come."""
        if not self._pumping and self._write_answers():
            self._pump()

    def _handle_requests(self) -> None:
        parser, server, exchanges = self._parser, self.server, self.exchanges
        application = server.application
        while len(exchanges) < server.limits.pipelined and not self._closing():
            request = parser.next_request()
            if request is None:
                self._wait_for_more()
                return
            head = request.head
            exchange = Exchange(self, head, server.now())
            exchanges.append(exchange)
            checked, self._partial, self._checked = self._checked, False, False
            try:
                if not checked:
                    application.check(head)
                application.handle(request, exchange)
            except HttpError as error:
                # Its frames hold the request; with a frame that holds the error it is a cycle: memory until a gc.
                error.__traceback__ = None
                exchange.fail(error)
            except Exception:
                log.exception("a bug: %s %s", head.method.decode(), head.target.decode())
                if exchange.response is None:
                    exchange.fail(HttpError(500, "internal error; the log has the details"))
            if parser.idle:
                return
        self._set_reading(False)

    def _wait_for_more(self) -> None:
        parser = self._parser
        if parser.idle:
            return
        if not self._partial:
            self._partial, self._since = True, self.server.now()
        head = parser.head
        # What may not come in is refused before its body is read; 100 Continue waits until it is this request's turn.
        if head is not None and not self._checked and not self.exchanges:
            self.server.application.check(head)
            self._checked = True
            if head.expect_continue and not parser.buffered_bytes and self.transport is not None:
                self.transport.write(CONTINUE)

    def _account(self, buffered_bytes: int) -> None:
        """Keep the sum over all connections of what incomplete requests hold in memory, and within its bound."""
        if buffered_bytes == self._accounted:
            return
        self.server.buffered_bytes += buffered_bytes - self._accounted
        self._accounted = buffered_bytes
        if buffered_bytes and self.server.buffered_bytes > self.server.limits.buffered_bytes and not self._closing():
            self._refuse(HttpError(503, "too many large requests at once; try again", (("Retry-After", "1"),)))

    def _account_unsent(self, unsent_bytes: int) -> None:
        """Answers that nobody reads count as well: beyond the bound, who does not read is cut off."""
        self.server.buffered_bytes += unsent_bytes - self._unsent
        self._unsent = unsent_bytes
        over = self.server.buffered_bytes > self.server.limits.buffered_bytes
        if unsent_bytes and over and self.transport is not None:
            self.transport.abort()

    def _closing(self) -> bool:
        return self._lingering is not None or bool(self.exchanges and self.exchanges[-1].close)

    def _refuse(self, error: HttpError) -> None:
        """Answer what cannot be read, behind the answers still due, and close then."""
        exchange = Exchange(self, self._parser.head, self.server.now(), refused=True)
        self.exchanges.append(exchange)
        exchange.fail(error)

    def _write_answers(self) -> bool:
        """Write the answers that are due, in the order of their requests. Tells whether there may be more to handle."""
        transport, exchanges = self.transport, self.exchanges
        if transport is None or transport.is_closing() or not exchanges or exchanges[0].response is None:
            return False
        answers = []
        while exchanges and (response := exchanges[0].response) is not None:
            exchange = exchanges.popleft()
            answers.append(response)
            if exchange.close:
                transport.write(b"".join(answers))
                exchanges.clear()
                if self._stuck_since is not None:
                    self._account_unsent(transport.get_write_buffer_size())
                if transport.is_closing():
                    return False
                self._finish(polite=not exchange.refused and self._parser.idle)
                return False
        transport.write(answers[0] if len(answers) == 1 else b"".join(answers))
        if self._stuck_since is not None:
            self._account_unsent(transport.get_write_buffer_size())
        if not self._partial:
            self._since = self.server.now()
        if (self._eof or self.server.draining) and not exchanges:
            if self._parser.idle or (self._eof and self._partial):
                transport.close()
                return False
            if self.server.draining and self._partial:
                self.drain()
                return self._pumping
        if not self._reading and self._stuck_since is None:
            self._set_reading(True)
            return True
        return self._partial and not self._checked and not exchanges

    def _finish(self, polite: bool) -> None:
        """Close. When the client may still be sending, close only our side first: a reset would destroy the answer on
        its way (RFC 9112 section 9.6)."""
        transport = self.transport
        assert transport is not None
        if polite or self._eof or not transport.can_write_eof():
            self._since = self.server.now()
            transport.close()
            return
        self._lingering = self.server.now() + LINGER_SECONDS
        self._parser = RequestParser(self.server.limits.request)
        self._account(0)
        transport.write_eof()
        self._set_reading(True)

    def _set_reading(self, on: bool) -> None:
        if on == self._reading or self.transport is None or self.transport.is_closing():
            return
        self._reading = on
        if on:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self._stuck_since = self.server.now()
        self._set_reading(False)

    def resume_writing(self) -> None:
        self._stuck_since = None
        self._account_unsent(0)
        if len(self.exchanges) < self.server.limits.pipelined and not self._closing():
            self._set_reading(True)
            self._pump()

    # Time

    def sweep(self, now: float) -> None:
        """Close what is idle, or too slow."""
        transport, limits = self.transport, self.server.limits
        if transport is None:
            return
        if self._lingering is not None:
            if now > self._lingering:
                transport.abort()
        elif self._stuck_since is not None:
            if now - self._stuck_since > limits.write_seconds:
                transport.abort()
        elif transport.is_closing():  # once the client has read its last answer
            if now - self._since > limits.write_seconds:
                transport.abort()
        elif self.exchanges:
            return
        elif self._partial:
            if self._parser.head is None:
                if now - self._since > limits.head_seconds:
                    self._refuse(HttpError(408, "the header section did not arrive in time"))
            elif now - self._since > limits.body_seconds + self._parser.buffered_bytes / SLOWEST_BODY_BYTES_PER_SECOND:
                self._refuse(HttpError(408, "the body did not arrive in time"))
        elif now - self._since > limits.idle_seconds:
            if transport.get_write_buffer_size():
                transport.abort()
            else:
                transport.close()

    def drain(self) -> None:
        """Close when nothing is under way; else the last answer does it."""
        if self._lingering is not None:
            self._lingering = min(self._lingering, self.server.now() + DRAINED_LINGER_SECONDS)
        if self.transport is None or self.exchanges or self._lingering is not None:
            return
        if self._partial:
            self._refuse(HttpError(503, "the server is shutting down; try again", (("Retry-After", "1"),)))
        else:
            self.transport.close()


class HttpServer:
    """Listens, and owns the connections."""

    def __init__(self, limits: ServerLimits, application: Application) -> None:
        self.limits = limits
        self.application = application
        self.connections: set[Connection] = set()
        self.buffered_bytes = 0
        self.draining = False
        self.date = formatdate(usegmt=True).encode()
        self.now = time.monotonic  # uvloop's own clock stands still while callbacks run, and counts whole milliseconds
        self._server: asyncio.Server | None = None
        self._empty = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None, reuse_port: bool = False) -> int:
        """Begin; the port it listens on. Raises StartupError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Connection(self),
                host,
                port,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if tls else None,
                reuse_port=reuse_port or None,
                backlog=4096,
            )
        except OSError as error:
            where = f"{host}:{port}"
            if error.errno == errno.EADDRINUSE:
                raise StartupError(f"{where} is in use by another program; stop it, or choose another port") from None
            raise StartupError(f"cannot listen on {where}: {error.strerror or error}") from None
        self._tick()
        return int(self._server.sockets[0].getsockname()[1])

    def _tick(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(1.0, self._tick)
        self.date = formatdate(usegmt=True).encode()
        now = self.now()
        for connection in list(self.connections):
            connection.sweep(now)

    def connection_closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def stop_listening(self) -> None:
        """Take no new connections, close the idle ones, and every other one with its next answer."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.drain()

    async def drained(self) -> None:
        """Wait until every connection has had its answers and is closed."""
        while self.connections:
            self._empty.clear()
            await self._empty.wait()

    def abort(self) -> None:
        """Cut what is left."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
