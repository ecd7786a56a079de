"""A transport without a socket, for unit tests of protocols: it keeps the calls."""

from __future__ import annotations

import asyncio


class FakeTransport(asyncio.Transport):
    """What was written is in `sent`. The peer reads nothing while `unsent` is set: the size of the write buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.unsent = 0
        self.reading = True
        self.closing = self.aborted = self.ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended, "written after the end of the stream"
        if not self.closing:
            self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True
