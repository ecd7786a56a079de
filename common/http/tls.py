"""TLS of one connection, sans-IO, on OpenSSL's memory buffers.

The event loop's own TLS makes a protocol only when the handshake is over. Here the connection exists from the accept
on, so that it is counted and timed like any other, and each side of it can be closed on its own.
"""

from __future__ import annotations

import ssl
from contextlib import suppress

# The memory of a handshake from its first byte to its end (measured over 4,000), besides what the client has sent.
HANDSHAKE_BYTES = 80 * 1024
FORGIVEN_BYTES = 1024  # of excess, for each request: its client may send each line of a head in two records
_RECORD_BYTES = 16 * 1024  # the most that a record carries (RFC 8446 section 5.1)


class Tls:
    """The server's side of TLS: bytes of the client in, and bytes for it out."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.held_bytes = 0  # for the handshake
        self._is_open = False
        self.excess_bytes = 0  # of what came, over twice its content
        self._received = b""  # and not given to OpenSSL, which would read all of it at once
        self._context = context
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object: ssl.SSLObject | None = None  # made at the first byte, so that silent clients cost little

    def receive(self, data: bytes) -> None:
        """Store bytes from the socket."""
        self._received += data
        if not self._is_open:
            self.held_bytes = (self.held_bytes or HANDSHAKE_BYTES) + len(data)

    def shake_hands(self) -> bool:
        """Continue the handshake, which takes a millisecond; return whether it is over. Raise ssl.SSLError."""
        if self._object is None:
            self._object = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(self._received)
        self._received = b""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self.held_bytes = 0
        self._is_open = True
        self._received = self._incoming.read()
        return True

    def decrypt(self, data: bytes) -> tuple[bytes, bool]:
        """Return the content, and whether the client has closed its side. Raise ssl.SSLError, for much framing too."""
        assert self._object is not None
        pieces: list[bytes] = []
        data, self._received = self._received + data, b""
        for at in range(0, max(1, len(data)), _RECORD_BYTES):
            self.excess_bytes += self._incoming.write(data[at : at + _RECORD_BYTES])
            with suppress(ssl.SSLWantReadError):
                while self._incoming.pending or self._object.pending():
                    piece = self._object.read(_RECORD_BYTES)
                    if not piece:
                        return b"".join(pieces), True
                    pieces.append(piece)
                    self.excess_bytes = max(0, self.excess_bytes - 2 * len(piece))
            if self.excess_bytes > 2 * _RECORD_BYTES:  # a change of keys takes 24 µs
                raise ssl.SSLError("too much framing")
        return b"".join(pieces), False

    def encrypt(self, data: bytes) -> bytes:
        """Return the encrypted form of `data`."""
        assert self._object is not None
        self._object.write(data)
        return self._outgoing.read()

    def end(self) -> bytes:
        """Return what to send to close our side. Do not wait for the client's end (RFC 8446 section 6.1)."""
        if self._object is not None:
            with suppress(ssl.SSLError):
                self._object.unwrap()
        return self._outgoing.read()

    def outgoing(self) -> bytes:
        """Return what to send of the handshake, or the alert of one that failed."""
        return self._outgoing.read()
