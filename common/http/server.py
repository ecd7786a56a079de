"""An HTTP server, which listens, makes the connections, sweeps their deadlines, and stops."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from contextlib import suppress
from email.utils import formatdate
from functools import partial

from common.errors import StartupError
from common.http.connection import Connection, ServerState
from common.http.exchange import Application
from common.http.phases import ServerLimits
from common.http.tls import Tls
from common.http.turns import Turns

log = logging.getLogger("predlog.http")

SWEEP_SECONDS = 1.0
DRAIN_SWEEP_SECONDS = 0.1
WARN_SECONDS = 60.0
BACKLOG = 4096  # Linux cuts it to net.core.somaxconn, which is 4,096 by default
# What the kernel buffers of an answer before the client's side has room. Its own bound is megabytes (tcp(7)). This one
# is small, so that what a slow client takes shows soon, and as progress.
UNSENT_BYTES_IN_KERNEL = 128 * 1024


class HttpServer:
    """A listener and its connections. Make it inside a running event loop. `turns` are those of the application."""

    def __init__(self, limits: ServerLimits, application: Application, turns: Turns | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        # uvloop's clock stands still while callbacks run, and counts whole milliseconds
        now = time.monotonic
        self.state = ServerState(limits, application, now, turns or Turns(self._loop.call_soon, now))
        self._tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._next_warning = 0.0

    @property
    def connections(self) -> set[Connection]:
        return self.state.pool.members

    async def listen(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        inherited: socket.socket | None = None,
    ) -> int:
        """Start listening; return the port. `inherited` is a bound socket to use in place of `host` and `port`.

        With `reuse_port` several processes listen on one port. Raise StartupError if the address cannot be bound.
        """
        self._tls = tls
        create = partial(self._loop.create_server, self._protocol, backlog=BACKLOG)
        try:
            if inherited is not None:
                self._server = await create(sock=inherited)
            else:
                self._server = await create(host, port, reuse_port=reuse_port or None)
        except OSError as error:
            why = error.strerror or error
            raise StartupError(f"cannot listen on {host}:{port}: {why}; free the port, or choose another") from None
        for listener in self._server.sockets:
            with suppress(OSError, AttributeError):  # Linux has it; each accepted socket inherits it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_IN_KERNEL)
        self._sweep(self._loop.time())
        return int(self._server.sockets[0].getsockname()[1])

    def _protocol(self) -> asyncio.Protocol:
        return Connection(self.state, None if self._tls is None else Tls(self._tls))

    def _sweep(self, due: float) -> None:
        """Do what is due once per second."""
        state, now = self.state, self._loop.time()
        state.date = formatdate(usegmt=True).encode()
        seconds = DRAIN_SWEEP_SECONDS if state.draining else SWEEP_SECONDS
        # A sweep that the loop delayed is skipped: what clients sent meanwhile is not read yet.
        if now - due < seconds:
            state.sweep()
        self._look_for_shortage(now)
        self._sweeper = self._loop.call_at(now + seconds, self._sweep, now + seconds)

    def _look_for_shortage(self, now: float) -> None:
        """Log why clients are refused, once per minute. If no descriptor is free, close a connection for the next one.

        libuv drops the clients that it has no descriptor for, without a report.
        """
        pool = self.state.pool
        shortage = f"all {self.state.limits.connections} connections are in use" if pool.refused else ""
        pool.refused = 0
        try:
            socket.socket().close()
        except OSError as error:
            shortage = error.strerror or str(error)
            if (silent := pool.longest_silent(self.state.now())) is not None:
                silent.leave()
        if shortage and now >= self._next_warning:
            self._next_warning = now + WARN_SECONDS
            log.warning("clients are refused: %s", shortage)

    async def stop_listening(self) -> None:
        """Accept no more clients, and end each connection with its next answer."""
        if self._server is not None:
            await asyncio.sleep(0)
            self._server.close()
            self._server = None
        self.state.drain()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep(self._loop.time())

    async def drained(self) -> None:
        """Wait until every connection has had its answers and is closed."""
        while self.connections:
            await asyncio.sleep(0.01)

    def abort(self) -> None:
        """Cut off the connections that are left, and stop listening."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
