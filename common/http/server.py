"""An HTTP server, which listens, owns the connections, sweeps their deadlines, and stops without refusing a client."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import formatdate

from common.errors import StartupError
from common.http.connection import Connection, ServerLimits, ServerState
from common.http.exchange import Application, Exchange
from common.http.phases import IDLE, LAST_REQUEST_SECONDS

__all__ = ["Application", "Exchange", "HttpServer", "ServerLimits"]

HANDSHAKE_SECONDS = 10.0  # of TLS
SWEEP_SECONDS = 1.0
DRAIN_SWEEP_SECONDS = 0.1
BACKLOG = 4096  # Linux cuts it to net.core.somaxconn, which is 4,096 by default
# What the kernel buffers of an answer before the client's side has room (tcp(7) does not bound it but by megabytes):
# small, so that what a slow client takes shows soon, and as progress.
UNSENT_BYTES_IN_KERNEL = 128 * 1024

HANDSHAKES_SECONDS = 0.05  # for those in flight when a stop begins: a round trip each
# Socket options that Python has no name for (asm-generic/socket.h). Their programs are in classic BPF.
_SO_ATTACH_FILTER, _SO_ATTACH_REUSEPORT_CBPF = 26, 51
_LOAD_BYTE, _SKIP_UNLESS_BITS, _RETURN = 0x30, 0x45, 0x06
# A socket's filter sees a segment from its TCP header on (RFC 9293 section 3.1).
_DROP_SYN = ((_LOAD_BYTE, 0, 0, 13), (_SKIP_UNLESS_BITS, 0, 1, 0x02), (_RETURN, 0, 0, 0), (_RETURN, 0, 0, 0xFFFFFFFF))


def _attach(listener: socket.socket, option: int, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Give the kernel a program for `listener`, each instruction as in struct sock_filter; do nothing without Linux."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("HP", len(program), ctypes.addressof(buffer))  # struct sock_fprog
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, option, fprog)


class HttpServer:
    """A listener and its connections. Make it inside a running event loop."""

    def __init__(self, limits: ServerLimits, application: Application) -> None:
        self._loop = asyncio.get_running_loop()
        # uvloop's clock stands still while callbacks run, and counts whole milliseconds
        self.state = ServerState(limits, application, time.monotonic, self._loop.call_soon)
        self.state.date = formatdate(usegmt=True).encode()
        self._tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._inherited = False
        self._handshakes: dict[Connection, float] = {}  # of TLS, that may be in progress, and when each began
        self._arrivals: set[asyncio.Task[None]] = set()  # of connections that were in the queue when the stop began
        self._arrive_until = 0.0
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> set[Connection]:
        return self.state.connections

    async def listen(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        processes: int = 1,
        inherited: socket.socket | None = None,
    ) -> int:
        """Start listening; return the port. `inherited` is a bound socket to use in place of `host` and `port`.

        `processes` is how many share the port, each with a socket of its own; while one more listens, which replaces
        another, all new clients are its.
        Raise StartupError if the address cannot be bound.
        """
        self._tls = tls
        self._inherited = inherited is not None
        handshake_seconds = HANDSHAKE_SECONDS if tls else None
        try:
            if inherited is not None:
                self._server = await self._loop.create_server(
                    self._connection, sock=inherited, ssl=tls, ssl_handshake_timeout=handshake_seconds, backlog=BACKLOG
                )
            else:
                self._server = await self._loop.create_server(
                    self._connection,
                    host,
                    port,
                    ssl=tls,
                    ssl_handshake_timeout=handshake_seconds,
                    reuse_port=processes > 1 or None,
                    backlog=BACKLOG,
                )
        except OSError as error:
            where = f"{host}:{port}"
            if error.errno == errno.EADDRINUSE:
                raise StartupError(f"{where} is in use by another program; stop it, or choose another port") from None
            raise StartupError(f"cannot listen on {where}: {error.strerror or error}") from None
        for listener in self._server.sockets:
            with suppress(OSError, AttributeError):  # Linux has it; each accepted socket inherits it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_IN_KERNEL)
            if processes > 1 and inherited is None:
                # The sockets of a port are numbered from 0 as they come. A number that none has leaves it to the hash.
                _attach(listener, _SO_ATTACH_REUSEPORT_CBPF, ((_RETURN, 0, 0, processes),))
        self._sweep_at(self._loop.time() + SWEEP_SECONDS)
        return int(self._server.sockets[0].getsockname()[1])

    def _connection(self) -> Connection:
        connection = Connection(self.state)
        if self._tls is not None:
            self._handshakes[connection] = self._loop.time()
        return connection

    def _forget_handshakes(self) -> None:
        """Forget the handshakes that have ended. Nothing tells of one that failed, so its time must pass."""
        since = self._loop.time() - HANDSHAKE_SECONDS
        self._handshakes = {
            connection: began
            for connection, began in self._handshakes.items()
            if connection.transport is None and connection.phase is IDLE and began > since
        }

    def _sweep_at(self, when: float) -> None:
        self._sweeper = self._loop.call_at(when, self._sweep, when)

    def _sweep(self, due: float) -> None:
        state = self.state
        state.date = formatdate(usegmt=True).encode()
        seconds = DRAIN_SWEEP_SECONDS if state.draining else SWEEP_SECONDS
        # A sweep that the loop delayed is skipped: what clients sent meanwhile is not read yet.
        if self._loop.time() - due < seconds:
            state.sweep()
        self._forget_handshakes()
        self._sweep_at(self._loop.time() + seconds)

    async def stop_listening(self) -> None:
        """Answer the clients that have connected, accept no others, and end each connection with its next answer.

        When a listening socket closes, the kernel resets the connections in its queue, whose requests may have been
        sent, and those whose handshake is in flight. So the handshakes end first, and none begins: the client sends its
        SYN again after a second (RFC 6298 section 2), and is refused then or served by another process.
        """
        server = self._server
        queues: list[socket.socket] = []
        if server is not None:
            if not self._inherited:  # the filter would stay on the socket, for the next process
                for listener in server.sockets:
                    _attach(listener, _SO_ATTACH_FILTER, _DROP_SYN)
                await asyncio.sleep(HANDSHAKES_SECONDS)
            queues = [socket.socket(fileno=os.dup(listener.fileno())) for listener in server.sockets]
            server.close()
            self._server = None
            await asyncio.sleep(0)
        accepted: list[socket.socket] = []
        for queue in queues:
            queue.setblocking(False)
            with suppress(OSError):
                while len(accepted) < BACKLOG:  # of a socket that another process listens on too, others may come
                    accepted.append(queue.accept()[0])
            queue.close()  # with nothing between: a client that comes now is refused, and can go elsewhere
        self._arrivals = {self._loop.create_task(self._arrive(client)) for client in accepted}
        self._arrive_until = self._loop.time() + LAST_REQUEST_SECONDS
        self.state.drain()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweep_at(self._loop.time() + DRAIN_SWEEP_SECONDS)

    async def _arrive(self, client: socket.socket) -> None:
        with suppress(OSError):
            client.setblocking(False)
            await self._loop.connect_accepted_socket(
                self._connection,
                client,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None,
            )

    def _is_one_arriving(self) -> bool:
        """Tell whether a client has connected that is in no connection yet, and may still be waited for."""
        self._forget_handshakes()
        arriving = bool(self._handshakes) or any(not task.done() for task in self._arrivals)
        return arriving and self._loop.time() < self._arrive_until

    async def drained(self) -> None:
        """Wait until every connection has had its answers and is closed. TLS handshakes have LAST_REQUEST_SECONDS."""
        while self.state.connections or self._is_one_arriving():
            await asyncio.sleep(0.01)

    def abort(self) -> None:
        """Cut off the connections that are left, and stop listening."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for task in self._arrivals:
            task.cancel()
        for connection in list(self.state.connections):
            connection.abort()
