"""A request and its answer, and the protocols between server and application."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from typing import Protocol

from common.errors import HttpError
from common.http.fields import JSON
from common.http.parser import Head, Request

JOINED_BYTES = 16 * 1024  # a smaller body costs less to join to its head than to write as a part of its own


class Application(Protocol):
    """The meaning of requests. The server calls it from the event loop; it must not block."""

    def check(self, head: Head) -> bytes:
        """Raise HttpError if the head is reason enough to refuse; else return header lines for any answer to it."""

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer the exchange, now or later, or raise HttpError."""

    def answered(self, exchange: Exchange, status: int) -> None:
        """Note an answer: the application's own, or a refusal by the server (`exchange.refused`)."""


class Client(Protocol):
    """The part of a connection that an exchange uses."""

    application: Application
    now: Callable[[], float]  # a monotonic clock, in seconds

    def __hash__(self) -> int: ...
    def hold(self, more_bytes: int) -> None: ...
    def flush(self) -> None: ...


class Exchange:
    """One request and its answer, which may come at any time, once."""

    __slots__ = ("_held_bytes", "began", "client", "close", "fields", "head", "refused", "response")

    def __init__(self, client: Client, head: Head | None, began: float, refused: bool = False) -> None:
        self.client = client  # the same for all requests of one connection
        self.fields = b""  # header lines for whatever the answer is
        self.head = head  # None if it could not be read
        self.began = began
        self.refused = refused  # by the server, before the request was complete
        self.close = head is None or refused or not head.keep_alive  # the connection, after the answer
        self.response: tuple[int, bytes, bytes, bytes] | None = None  # as given to `answer`
        self._held_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Count memory until the answer is written. Raise HttpError 503 when all connections hold too much."""
        more_bytes = size_bytes - self._held_bytes
        self._held_bytes = size_bytes
        self.client.hold(more_bytes)

    def answer(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Answer the request, once. `extra` is whole header lines. Nothing is sent to a client that left."""
        if self.response is not None:
            raise RuntimeError("an exchange is answered once")
        self.response = status, body, content_type, extra + self.fields if self.fields else extra
        client = self.client
        client.application.answered(self, status)
        client.flush()

    def fail(self, error: HttpError) -> None:
        """Answer with an error, as {"detail": "…"}."""
        body = json.dumps({"detail": error.detail}, ensure_ascii=False, separators=(",", ":")).encode()
        self.answer(error.status, body, extra=error.fields)

    def encode(self, date: bytes) -> tuple[bytes, ...]:
        """Return the answer in one part, or in two when its body is large, so that only the kernel copies it.

        `date` is an IMF-fixdate (RFC 9110 section 5.6.7).
        """
        assert self.response is not None
        if self._held_bytes:
            self.hold(0)
        status, body, content_type, extra = self.response
        head = self.head
        prefix = _prefix(status, content_type, date, self.close, head is not None and head.http10)
        if status == 204:  # has neither content nor Content-Length (RFC 9110 section 8.6)
            return (b"%b%b\r\n" % (prefix, extra),)
        content_bytes = len(body)
        if head is not None and head.method == b"HEAD":
            body = b""
        if len(body) <= JOINED_BYTES:
            return (b"".join((prefix, b"%d\r\n" % content_bytes, extra, b"\r\n", body)),)
        return b"%b%d\r\n%b\r\n" % (prefix, content_bytes, extra), body

    def seconds(self) -> float:
        """Return the time since the request was complete."""
        return self.client.now() - self.began


@lru_cache(64)
def _prefix(status: int, content_type: bytes, date: bytes, close: bool, http10: bool) -> bytes:
    """Return a response up to the value of Content-Length, as HTTP/1.1 for 1.0 clients too (RFC 9110 section 2.5)."""
    prefix = b"HTTP/1.1 %d %b\r\nDate: %b\r\n" % (status, HTTPStatus(status).phrase.encode(), date)
    if close:
        prefix += b"Connection: close\r\n"
    elif http10:
        prefix += b"Connection: keep-alive\r\n"
    if status == 204:
        return prefix
    return prefix + b"Content-Type: %b\r\nContent-Length: " % content_type
