"""An HTTP server, which listens, owns the connections, sweeps their deadlines, and stops without refusing a client."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
from contextlib import suppress
from email.utils import formatdate

from common.errors import StartupError
from common.http.connection import Connection, ServerLimits, ServerState
from common.http.exchange import Application, Exchange

__all__ = ["Application", "Exchange", "HttpServer", "ServerLimits"]

HANDSHAKE_SECONDS = 10.0  # of TLS
SWEEP_SECONDS = 1.0
DRAIN_SWEEP_SECONDS = 0.1
BACKLOG = 4096  # Linux cuts it to net.core.somaxconn, which is 4,096 by default
# What the kernel buffers of an answer before the client's side has room (tcp(7) does not bound it but by megabytes):
# small, so that what a slow client takes shows soon, and as progress.
UNSENT_BYTES_IN_KERNEL = 128 * 1024


class HttpServer:
    """A listener and its connections. Make it inside a running event loop."""

    def __init__(self, limits: ServerLimits, application: Application) -> None:
        self._loop = asyncio.get_running_loop()
        # uvloop's clock stands still while callbacks run, and counts whole milliseconds
        self.state = ServerState(limits, application, time.monotonic, self._loop.call_soon)
        self.state.date = formatdate(usegmt=True).encode()
        self._tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> set[Connection]:
        return self.state.connections

    async def listen(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        inherited: socket.socket | None = None,
    ) -> int:
        """Start listening; return the port. `inherited` is a bound socket to use in place of `host` and `port`.

        Raise StartupError if the address cannot be bound.
        """
        self._tls = tls
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
                    reuse_port=reuse_port or None,
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
        self._sweep_at(self._loop.time() + SWEEP_SECONDS)
        return int(self._server.sockets[0].getsockname()[1])

    def _connection(self) -> Connection:
        return Connection(self.state)

    def _sweep_at(self, when: float) -> None:
        self._sweeper = self._loop.call_at(when, self._sweep, when)

    def _sweep(self, due: float) -> None:
        state = self.state
        state.date = formatdate(usegmt=True).encode()
        seconds = DRAIN_SWEEP_SECONDS if state.draining else SWEEP_SECONDS
        # A sweep that the loop delayed is skipped: what clients sent meanwhile is not read yet.
        if self._loop.time() - due < seconds:
            state.sweep()
        self._sweep_at(self._loop.time() + seconds)

    async def stop_listening(self) -> None:
        """Answer the clients that have connected, accept no others, and end each connection with its next answer.

        A listening socket that closes resets what waits in its queue, with requests that may have been sent already.
        """
        server, self._server = self._server, None
        queues: list[socket.socket] = []
        if server is not None:
            queues = [socket.socket(fileno=os.dup(listener.fileno())) for listener in server.sockets]
            server.close()
            await asyncio.sleep(0)
        accepted: list[socket.socket] = []
        for queue in queues:
            queue.setblocking(False)
            with suppress(OSError):
                while len(accepted) < BACKLOG:  # of a socket that another process listens on too, others may come
                    accepted.append(queue.accept()[0])
            queue.close()  # with nothing between: a client that comes now is refused, and can go elsewhere
        for client in accepted:
            with suppress(OSError):
                client.setblocking(False)
                await self._loop.connect_accepted_socket(
                    self._connection,
                    client,
                    ssl=self._tls,
                    ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None,
                )
        self.state.drain()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweep_at(self._loop.time() + DRAIN_SWEEP_SECONDS)

    async def drained(self) -> None:
        """Wait until every connection has had its answers and is closed."""
        while self.state.connections:
            await asyncio.sleep(0.01)

    def abort(self) -> None:
        """Cut off the connections that are left, and stop listening."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.state.connections):
            connection.abort()
