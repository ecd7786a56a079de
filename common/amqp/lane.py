"""The fast lane: a protocol under aiormq's reader that takes the hot frames itself and hands aiormq all the others.

aiormq keeps the handshake, TLS, topology, calls and errors. Two rules make that safe. Only this lane publishes and acks
on the hot channel, since a publish of aiormq's there would shift the delivery tags. Only whole frames are written, so
that the lane and aiormq can share the socket.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiormq import TransportFactory

from common.amqp.codec import HEARTBEAT, Confirm, Delivery, FrameDecoder, FrameError, Part
from common.errors import StartupError

if TYPE_CHECKING:
    from yarl import URL


CONNECT_TIMEOUT_SECONDS = 2.0  # of TCP and TLS, and of the name look-up before them
HEARTBEAT_FEED_SECONDS = 1.0
JOINED_BYTES = 4096  # parts that are larger on average cost less to write one by one than to join


class LaneListener(Protocol):
    """The receiver of one connection's hot frames, which ignores those that it does not override. It must not raise."""

    def deliveries(self, deliveries: list[Delivery]) -> None:
        """Take messages for the consumer of the hot channel, in order."""
        return

    def confirms(self, confirms: list[Confirm]) -> None:
        """Take confirms of what was published on the hot channel."""
        return

    def blocked(self, reason: str) -> None:
        """Note why the broker stopped reading what is published (connection.blocked); "" when it reads again."""
        return


class FastLane(asyncio.StreamReaderProtocol):
    """The hot frames of one connection.

    The future `gone` is done, with the reason, as soon as the connection or its hot channel can no longer be used.
    """

    def __init__(self, listener: LaneListener, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self.congested = False  # more than `high_water_bytes` wait for the broker to read them
        self.gone: asyncio.Future[str] = loop.create_future()
        self._deliveries, self._confirms, self._blocked = listener.deliveries, listener.confirms, listener.blocked
        self._decoder = FrameDecoder()
        self._cold_reader = reader
        self._lane_loop = loop
        self._held_back = False
        self._heartbeat_due = 0.0
        self._lane_transport: asyncio.Transport | None = None

    @property
    def lost(self) -> str | None:
        """The reason why the lane can no longer be used; None while it can."""
        return self.gone.result() if self.gone.done() else None

    def negotiated(self, frame_max: int, high_water_bytes: int) -> None:
        """Set the negotiated frame size, and how many bytes may wait to be written before the lane is `congested`."""
        self._decoder.frame_max = frame_max
        if self._lane_transport is not None:
            self._lane_transport.set_write_buffer_limits(high=min(high_water_bytes, 2**31 - 1))  # uvloop's int

    # Out

    def send(self, parts: Iterable[Part]) -> None:
        """Send whole frames, given in parts, with one write."""
        parts = list(parts)
        if self._lane_transport is None or self.gone.done():
            return
        if sum(map(len, parts)) < JOINED_BYTES * len(parts):
            self._lane_transport.write(b"".join(parts))
        else:
            self._lane_transport.writelines(parts)

    # In

    def hold_back(self, held: bool) -> None:
        """Stop or resume reading, to bound the deliveries in memory."""
        transport = self._lane_transport
        if transport is not None and held != self._held_back and not transport.is_closing():
            self._held_back = held
            (transport.pause_reading if held else transport.resume_reading)()

    def keep_alive(self) -> None:
        """Keep aiormq's liveness clock from taking a held-back lane for a dead broker. Call it once a second."""
        if self._held_back and not self.gone.done():
            self._cold_reader.feed_data(HEARTBEAT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._lane_transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        decoder = self._decoder
        try:
            cold = decoder.feed(data)
        except (FrameError, struct.error, IndexError) as error:
            self.fail(f"the broker sent invalid AMQP: {error}")
            return
        if cold:
            self._cold_reader.feed_data(cold)
        if decoder.notices:
            for kind, text in decoder.notices:
                (self._blocked if kind == "blocked" else self._lose)(text)
            decoder.notices = []
        confirms, deliveries = decoder.confirms, decoder.deliveries
        if not confirms and not deliveries:
            return
        is_lost = self.gone.done()  # the broker acks a returned message too, and all are published again
        if confirms:
            decoder.confirms = []
            if not is_lost:
                self._confirms(confirms)
        if deliveries:
            decoder.deliveries = []
            if not is_lost:
                self._deliveries(deliveries)
        now = self._lane_loop.time()
        if now >= self._heartbeat_due:  # aiormq sees only what it is fed, and a busy broker need not send heartbeats
            self._heartbeat_due = now + HEARTBEAT_FEED_SECONDS
            self._cold_reader.feed_data(HEARTBEAT)

    # The end

    def fail(self, reason: str) -> None:
        """Abort the connection, for `reason`."""
        self._lose(reason)
        if self._lane_transport is not None:
            self._lane_transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(f"connection lost ({exc})" if exc else "connection closed by the broker")
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:
        self._lose("connection closed by the broker")
        return super().eof_received()

    def _lose(self, reason: str) -> None:
        if not self.gone.done():
            self.gone.set_result(reason)

    def pause_writing(self) -> None:
        self.congested = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self.congested = False
        super().resume_writing()


class FastLaneFactory(TransportFactory):
    """A factory of the one socket that aiormq reads and writes, to one address, with `lane` under its reader."""

    def __init__(self, listener: LaneListener, ip: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader(loop=loop)
        self.lane = FastLane(listener, self._reader, loop)
        self._ip, self._port = ip, port

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        try:
            tls = await kwargs["ssl_context_provider"].get_context() if url.scheme == "amqps" else None
        except OSError as error:  # includes ssl.SSLError; neither names the file
            files = ", ".join(url.query[key] for key in ("cafile", "certfile", "keyfile") if key in url.query)
            why = error.strerror or error
            raise StartupError(f"AMQP_URL names a file that cannot be used: {files} ({why})") from None
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):  # the kernel would wait for minutes for a dead host
            transport, _ = await loop.create_connection(
                lambda: self.lane, self._ip, self._port, ssl=tls, server_hostname=url.host if tls else None
            )
        return self._reader, asyncio.StreamWriter(transport, self.lane, self._reader, loop)
