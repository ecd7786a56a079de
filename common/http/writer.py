"""The output of a connection: TLS, if any, and the time that the client takes for what is sent."""

from __future__ import annotations

import asyncio
import ssl

from common.http.phases import after_progress
from common.http.tls import Tls


class Writer:
    """What is sent to a client, which is timed while it does not read (`stuck`), and while the connection closes."""

    def __init__(self, transport: asyncio.Transport, tls: Tls | None) -> None:
        self.stuck = False  # the transport holds more than it wants to
        self.unsent_bytes = 0  # at the last look, while the client is timed
        self.since = 0.0  # when the client was last given time, or later by what it has taken
        self._transport = transport
        self._tls = tls

    def write(self, parts: tuple[bytes, ...]) -> None:
        """Send bytes, which are copied only by the kernel, or by TLS."""
        if self._tls is not None:
            try:
                parts = (self._tls.encrypt(b"".join(parts)),)
            except ssl.SSLError:  # the client has sent half of a handshake message, so OpenSSL takes no more from us
                self._transport.abort()
                return
        if self.stuck:
            self.unsent_bytes += sum(map(len, parts))
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    def end(self, close: bool) -> None:
        """Close our side of the connection after what is written, or both sides."""
        if self._transport.is_closing():
            return
        if self._tls is not None and (notice := self._tls.end()):
            self._transport.write(notice)
        if close:
            self._transport.close()
        else:
            self._transport.write_eof()

    def time_client(self, now: float) -> None:
        """Give the client its time to take what is unsent."""
        self.unsent_bytes = self._transport.get_write_buffer_size()
        self.since = now

    def look(self, now: float) -> None:
        """Grant time for what the client has taken since the last look."""
        unsent_bytes = self._transport.get_write_buffer_size()
        self.since = after_progress(self.since, max(0, self.unsent_bytes - unsent_bytes), now)
        self.unsent_bytes = unsent_bytes
