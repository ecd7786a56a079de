"""One request and its answer, and what an application is to the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from common.errors import HttpError
from common.http.parser import Head, Request
from common.http.response import encode_response

JSON = b"application/json"


class Application(Protocol):
    """What requests mean. The server calls it from the event loop; it must not block."""

    def check(self, head: Head) -> bytes:
        """Raise HttpError for what the head alone condemns; return header lines for whatever the answer will be.

        Called once a request, before `handle`, and before the body is read if it is still to come.
        """

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer the exchange, now or later, or raise HttpError."""

    def answered(self, exchange: Exchange, status: int) -> None:
        """Take note of an answer: the application's own, or a refusal by the server (`exchange.refused`)."""


class State(Protocol):
    """What an exchange asks of its server."""

    application: Application
    now: Callable[[], float]  # a monotonic clock, in seconds
    date: bytes  # now, as a Date field has it
    draining: bool
    held_bytes: int

    def require_memory(self) -> None:
        """Raise HttpError 503 when all connections together hold too much."""


class Client(Protocol):
    """What an exchange asks of its connection."""

    @property
    def state(self) -> State: ...

    def __hash__(self) -> int: ...

    def ends_with(self, exchange: Exchange) -> bool:
        """Whether the connection shall close with this answer, though the client would keep it."""

    def flush(self) -> None:
        """Write the answers that are due."""


class Exchange:
    """One request and its answer, which may come at any time, once."""

    __slots__ = ("_held_bytes", "began", "client", "close", "fields", "head", "refused", "response")

    def __init__(self, client: Client, head: Head | None, began: float, refused: bool = False) -> None:
        self.client = client  # the same for all requests of one connection
        self.fields = b""  # header lines for whatever the answer is
        self.head = head  # None: it could not be read
        self.began = began
        self.refused = refused  # before the request was complete
        self.close = head is None or refused or not head.keep_alive
        self.response: bytes | None = None
        self._held_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Account for what the request holds now, until there is an answer.

        Raise HttpError 503 when all connections hold too much.
        """
        self.client.state.held_bytes += size_bytes - self._held_bytes
        self._held_bytes = size_bytes
        self.client.state.require_memory()

    def answer(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Answer; `extra` is whole header lines, each with its CRLF. An answer to a client that left goes nowhere.

        Raise RuntimeError when there is an answer already.
        """
        if self.response is not None:
            raise RuntimeError("an exchange is answered once")
        client = self.client
        state = client.state
        if state.draining and not self.close and client.ends_with(self):
            self.close = True
        head = self.head
        self.response = encode_response(
            status,
            body,
            content_type,
            state.date,
            extra + self.fields if self.fields else extra,
            keep_alive=not self.close,
            head_only=head is not None and head.method == b"HEAD",
            http10=head is not None and head.http10,
        )
        if self._held_bytes:
            state.held_bytes -= self._held_bytes
            self._held_bytes = 0
        state.application.answered(self, status)
        client.flush()

    def fail(self, error: HttpError) -> None:
        """Answer with an error, in the contract's shape."""
        body = json.dumps({"detail": error.detail}, ensure_ascii=False, separators=(",", ":")).encode()
        self.answer(error.status, body, extra=error.fields)

    def seconds(self) -> float:
        """The time since the request was complete."""
        return self.client.state.now() - self.began
