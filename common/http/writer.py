"""What a connection sends: its answers, in the order of their requests, and how the client takes them."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from common.http.exchange import Exchange
from common.http.phases import granted
from common.http.tls import Tls


class Writer:
    """The answers that are due, and what of those written the client has not taken.

    The client is timed while it does not read (`stuck`), and while the connection closes.
    """

    def __init__(self, transport: asyncio.Transport, tls: Tls | None, seconds: float) -> None:
        self.due: deque[Exchange] = deque()
        self.stuck = False  # the transport holds more than it wants to
        self.unsent_bytes = 0  # at the last look, while the client is timed
        self.deadline = math.inf  # for the client to take more
        self._transport = transport
        self._tls = tls
        self._seconds = seconds  # without progress

    def write_due(self, date: bytes, last: Exchange | None) -> Exchange | None:
        """Write the answers that are there, up to the first that is not; return the exchange of the last one written.

        An answer that closes the connection ends them, as does that of `last`.
        """
        due = self.due
        if not due or due[0].response is None or self._transport.is_closing():
            return None
        parts: list[bytes] = []
        while due and due[0].response is not None:
            exchange = due.popleft()
            if exchange is last:
                exchange.close = True
            parts += exchange.encode(date)
            if exchange.close:
                due.clear()
        self.write(parts)
        return exchange

    def write(self, parts: list[bytes]) -> None:
        if self._tls is not None:
            parts = [self._tls.encrypt(b"".join(parts))]
        if self.stuck:
            self.unsent_bytes += sum(map(len, parts))
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    def end(self, close: bool) -> None:
        """Close our side of the connection behind what is written, or all of it."""
        if self._tls is not None and not self._transport.is_closing():
            self._transport.write(self._tls.end())
        if close:
            self._transport.close()
        elif not self._transport.is_closing():
            self._transport.write_eof()

    def time_client(self, now: float) -> None:
        """Give the client its time to take what is unsent."""
        self.unsent_bytes = self._transport.get_write_buffer_size()
        self.deadline = now + self._seconds

    def look(self, now: float) -> None:
        """Grant time for what the client has taken since the last look."""
        unsent_bytes = self._transport.get_write_buffer_size()
        taken_bytes = self.unsent_bytes - unsent_bytes
        self.unsent_bytes = unsent_bytes
        if taken_bytes > 0:
            self.deadline = granted(self.deadline, taken_bytes, now, self._seconds)
