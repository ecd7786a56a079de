"""A request and its answer, and the protocols between server and application."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from common.errors import HttpError
from common.http.fields import JSON
from common.http.parser import Head, Request
from common.http.response import encode_response


class Application(Protocol):
    """The meaning of requests. The server calls it from the event loop; it must not block."""

    def check(self, head: Head) -> bytes:
        """Raise HttpError if the head alone decides that; else return header lines for any answer to the request.

        Called once for each request, before `handle` and before a body that is still to come is read.
        """

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer the exchange, now or later, or raise HttpError."""

    def answered(self, exchange: Exchange, status: int) -> None:
        """Take note of an answer: the application's own, or a refusal by the server (`exchange.refused`)."""


class Client(Protocol):
    """The part of a connection that an exchange uses."""

    application: Application
    now: Callable[[], float]  # a monotonic clock, in seconds

    def __hash__(self) -> int: ...

    def hold(self, more_bytes: int) -> None:
        """Count memory that a request holds, or, if negative, does not hold any more.

        Raise HttpError 503 when all connections together hold too much.
        """

    def flush(self) -> None:
        """Write the answers that are due."""


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
        """Count `size_bytes` as memory that the request holds until it is answered.

        Raise HttpError 503 when all connections hold too much.
        """
        more_bytes = size_bytes - self._held_bytes
        self._held_bytes = size_bytes
        self.client.hold(more_bytes)

    def answer(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Answer the request. `extra` is whole header lines, each with its CRLF. Nothing is sent to a client that left.

        Raise RuntimeError if it has an answer.
        """
        if self.response is not None:
            raise RuntimeError("an exchange is answered once")
        self.response = status, body, content_type, extra + self.fields if self.fields else extra
        client = self.client
        if self._held_bytes:
            client.hold(-self._held_bytes)
        client.application.answered(self, status)
        client.flush()

    def fail(self, error: HttpError) -> None:
        """Answer with an error, as {"detail": "…"}."""
        body = json.dumps({"detail": error.detail}, ensure_ascii=False, separators=(",", ":")).encode()
        self.answer(error.status, body, extra=error.fields)

    def encode(self, date: bytes) -> tuple[bytes, ...]:
        """Return the answer as it is sent, in parts. `date` is the value of its Date field."""
        assert self.response is not None
        status, body, content_type, extra = self.response
        head = self.head
        return encode_response(
            status,
            body,
            content_type,
            date,
            extra,
            keep_alive=not self.close,
            head_only=head is not None and head.method == b"HEAD",
            http10=head is not None and head.http10,
        )

    def seconds(self) -> float:
        """Return the time since the request was complete."""
        return self.client.now() - self.began
