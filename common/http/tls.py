"""TLS between a socket and a connection, on OpenSSL's memory buffers.

The event loop's own TLS makes a protocol only when the handshake is over. Here the connection exists from the accept
on, so that it is counted and timed as any other, and each side of it can be closed alone.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import cast

from common.http.connection import Connection
from common.http.turns import Job

# What OpenSSL holds for a handshake from its first byte on, measured, besides what the client has sent.
HANDSHAKE_BYTES = 48 * 1024
_RECORD_BYTES = 16 * 1024  # the most that a record carries (RFC 8446 section 5.1)


class Tls(asyncio.Protocol):
    """The protocol of a socket's transport, and the transport of a Connection."""

    def __init__(self, context: ssl.SSLContext, connection: Connection) -> None:
        self._connection = connection
        self._context = context
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._received_bytes = 0  # of the handshake
        self._is_open = False  # the handshake is over
        self._tls: ssl.SSLObject | None = None  # None before the first byte, and once our side is closed

    # As the protocol of the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connection.connection_made(cast(asyncio.Transport, self))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_open:
            if self._tls is None:
                self._connection.data_received(data)  # which only wants to know that something came
            else:
                self._incoming.write(data)
                self._read(self._tls)
            return
        if self._tls is None:
            self._tls = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(data)
        self._received_bytes += len(data)
        self._connection.handshake_holds(HANDSHAKE_BYTES + self._received_bytes)
        self._connection.state.turns.add(self._connection, self._shake_hands(self._tls))

    def eof_received(self) -> bool:
        return self._is_open and self._connection.eof_received()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def _shake_hands(self, tls: ssl.SSLObject) -> Job:
        """Continue the handshake, a millisecond of work, and read what came with its end."""
        try:
            if not self._is_open and not self._transport.is_closing():
                tls.do_handshake()
                self._is_open = True
                self._connection.handshake_done()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:  # not TLS, or no common version: the client gets an alert
            self._send()
            self._transport.close()
        self._send()
        yield None
        if self._is_open:
            self._read(tls)

    def _read(self, tls: ssl.SSLObject) -> None:
        """Decrypt what has arrived, and give it to the connection as one piece."""
        pieces = []
        try:
            while self._incoming.pending or tls.pending():
                pieces.append(tls.read(_RECORD_BYTES))
                if not pieces[-1]:  # the client has closed its side
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self.abort()
            return
        if data := b"".join(pieces):
            self._connection.data_received(data)
        if pieces and not pieces[-1] and not self._connection.eof_received():
            self.close()

    def _send(self) -> None:
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    # As the transport of the connection

    def write(self, data: bytes) -> None:
        if self._tls is not None:
            self._tls.write(data)
            self._send()

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def write_eof(self) -> None:
        """Close our side. What the client still sends is not decrypted."""
        self._end()
        self._transport.write_eof()

    def close(self) -> None:
        self._end()
        self._transport.close()

    def _end(self) -> None:
        if self._tls is not None:
            with suppress(ssl.SSLError):  # the client's own close_notify is not waited for (RFC 8446 section 6.1)
                self._tls.unwrap()
            self._send()
            self._tls = None

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._transport.is_closing()
