"""What each request to the producer means, its answer, and what is counted. Knows no socket and no broker.

`Api` is the HTTP server's application. An accepted event goes to the publisher, whose confirm answers the exchange.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import __version__
from common.config import ProducerSettings
from common.errors import HttpError, InvalidEvent, NotConfirmed, OutcomeUnknown, TooLarge, Unavailable
from common.event.document import write_json
from common.event.ids import keyed_message_id
from common.event.rows import count_rows
from common.event.schema import normalise_batch, normalise_event
from common.http.coding import decoded, require_known_coding
from common.http.fields import idempotency_key, is_json_lines, require_json
from common.http.parser import Head, Request
from common.http.server import Exchange
from common.metrics import CONTENT_TYPE as METRICS_TYPE
from common.producer import openapi
from common.producer.metrics import METHODS, OTHER, Counters
from common.producer.publisher import Publication, Publisher

HTML = b"text/html; charset=utf-8"
PAGE = Path(__file__).parent / "page.html"
_KNOWN_METHODS = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"QUERY"}
)
_PAGES = frozenset({b"/metrics", b"/openapi.json", b"/docs"})


class _Post(Publication):
    """The event of a POST /process."""

    __slots__ = ("_api", "_exchange")

    def __init__(self, body: bytes, message_id: bytes, api: Api, exchange: Exchange) -> None:
        self.body = body
        self.message_id = message_id
        self._api = api
        self._exchange = exchange

    def confirmed(self, seconds: float) -> None:
        self._api.count_event(self.body, seconds)
        self._exchange.answer(200, self.body)

    def failed(self, error: HttpError | NotConfirmed) -> None:
        self._api.refuse(self._exchange, error)


class _Batch:
    """A POST /process/batch: publishes its events as the window lets it, answers when the last has its outcome."""

    def __init__(self, api: Api, exchange: Exchange, key: bytes | None, events: Sequence[bytes | InvalidEvent]) -> None:
        self._api = api
        self._exchange = exchange
        self._key = key
        self._events = events
        self._results: list[dict[str, object]] = [{}] * len(events)
        self._next = 0
        self._under_way = 0

    def go_on(self) -> None:
        """Publish what the window takes. When it is full of others' events, the rest is refused."""
        while self._next < len(self._events):
            position = self._next
            item = self._events[position]
            if isinstance(item, InvalidEvent):
                self._results[position] = {"status": item.status, "detail": item.faults}
            else:
                # No key has a NUL: this one is no other request's.
                key = None if self._key is None else b"%b\x00%d" % (self._key, position)
                try:
                    self._api.publish(_BatchItem(item, self._api.message_id(item, key), self._api, self, position))
                except Unavailable as error:
                    if self._under_way and error.reason == "window_full":
                        return
                    self._refuse(position, error)
                except (HttpError, NotConfirmed) as error:
                    self._refuse(position, error)
                else:
                    self._under_way += 1
            self._next += 1
        if not self._under_way:
            accepted = sum(result["status"] == 200 for result in self._results)
            status = 200 if accepted == len(self._events) else 207
            self._exchange.answer(status, write_json({"accepted": accepted, "results": self._results}))

    def accept(self, position: int) -> None:
        """An event is confirmed."""
        self._results[position] = {"status": 200}
        self._settled()

    def fail(self, position: int, error: HttpError | NotConfirmed) -> None:
        """An event that was published is not accepted, or its outcome is unknown."""
        self._refuse(position, error)
        self._settled()

    def _refuse(self, position: int, error: HttpError | NotConfirmed) -> None:
        refusal = self._api.as_http(error)
        self._results[position] = {"status": refusal.status, "detail": refusal.detail}

    def _settled(self) -> None:
        self._under_way -= 1
        self.go_on()


class _BatchItem(Publication):
    """One event of a batch."""

    __slots__ = ("_api", "_batch", "_position")

    def __init__(self, body: bytes, message_id: bytes, api: Api, batch: _Batch, position: int) -> None:
        self.body = body
        self.message_id = message_id
        self._api = api
        self._batch = batch
        self._position = position

    def confirmed(self, seconds: float) -> None:
        self._api.count_event(self.body, seconds)
        self._batch.accept(self._position)

    def failed(self, error: HttpError | NotConfirmed) -> None:
        self._batch.fail(self._position, error)


def random_uuids() -> Iterator[bytes]:
    """Version 4 UUIDs as 32 hex digits (RFC 9562 section 5.4), made many at once."""
    while True:
        block = bytearray(os.urandom(16 * 256))
        block[6::16] = block[6::16].translate(_VERSION_4)
        block[8::16] = block[8::16].translate(_VARIANT)
        digits = block.hex().encode()
        for at in range(0, len(digits), 32):
            yield digits[at : at + 32]


_VERSION_4 = bytes(byte & 0x0F | 0x40 for byte in range(256))
_VARIANT = bytes(byte & 0x3F | 0x80 for byte in range(256))


class Api:
    """What each request means."""

    def __init__(
        self, settings: ProducerSettings, publisher: Publisher, counters: Counters, rows: Sequence[Sequence[float]]
    ) -> None:
        self._settings = settings
        self._publisher = publisher
        self._counters = counters
        self._rows = rows  # the metrics of every worker
        self._tokens = [b"Bearer " + token.encode() for token in settings.api_token.split(",") if token]
        self._openapi = write_json(
            openapi.document(
                __version__, settings.max_preds, settings.max_body_bytes, bool(self._tokens), settings.protect_pages
            )
        )
        self._page = PAGE.read_bytes()
        self._page_headers = openapi.page_headers(self._page)
        self._uuids = random_uuids()
        self._stops = False
        self.publish = publisher.publish

    # Requests

    def check(self, head: Head) -> None:
        """Refuse what its head alone condemns; raises HttpError."""
        methods = METHODS.get(head.path)
        if methods is None:
            if head.path == b"*" and head.method == b"OPTIONS":
                return
            raise HttpError(404, "no such page; see /docs")
        if head.method not in methods:
            if head.method not in _KNOWN_METHODS:
                raise HttpError(501, "no such method")
            allow = ", ".join(method.decode() for method in methods)
            raise HttpError(405, f"this page takes {allow}", (("Allow", allow),))
        if self._tokens and (head.method == b"POST" or (self._settings.protect_pages and head.path in _PAGES)):
            self._authorize(head.authorization)
        if head.method == b"POST":
            if head.content_type != b"application/json":
                require_json(head.content_type, lines=head.path == b"/process/batch")
            if head.content_encoding is not None:
                require_known_coding(head.content_encoding)

    def _authorize(self, given: bytes | None) -> None:
        if given is not None and given[:7].lower() == b"bearer ":
            given = b"Bearer " + given[7:].strip()
            # Every token is compared, each in constant time.
            if sum([hmac.compare_digest(given, token) for token in self._tokens]):
                return
        detail = "a bearer token is needed" if given is None else "this token is not known"
        challenge = 'Bearer realm="predlog"' + ("" if given is None else ', error="invalid_token"')
        raise HttpError(401, detail, (("WWW-Authenticate", challenge),))

    def announce_stop(self) -> None:
        """From now on /readyz says that the server is shutting down; events are accepted until it has."""
        self._stops = True

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer a request, now or when its events have their outcome."""
        try:
            self._handle(request, exchange)
        except (InvalidEvent, NotConfirmed) as error:
            # Its frames hold the request; with a frame that holds the error it is a cycle: memory until a gc.
            error.__traceback__ = None
            self.refuse(exchange, error)

    def _handle(self, request: Request, exchange: Exchange) -> None:
        path = request.head.path
        if path == b"/process":
            self._process(request, exchange)
        elif path == b"/process/batch":
            self._process_batch(request, exchange)
        elif path == b"/healthz":
            exchange.answer(200, b'{"status":"alive"}')
        elif path == b"/readyz":
            if self._stops:
                raise HttpError(503, "the server is shutting down", (("Retry-After", "1"),))
            trouble = self._publisher.trouble()
            if trouble is not None:
                raise HttpError(503, trouble.why, (("Retry-After", "1"),))
            exchange.answer(200, b'{"status":"ready"}')
        elif path == b"/metrics":
            self._set_gauges()
            exchange.answer(200, self._counters.metrics.render(self._rows), METRICS_TYPE)
        elif path == b"/openapi.json":
            exchange.answer(200, self._openapi)
        elif path == b"/docs":
            exchange.answer(200, self._page, HTML, self._page_headers)
        else:
            exchange.answer(200, b"", extra=b"Allow: GET, HEAD, POST, OPTIONS\r\n")

    def as_http(self, error: HttpError | NotConfirmed) -> HttpError:
        """What a client is told of an event that is not stored, or may not be; counted by its reason."""
        if isinstance(error, Unavailable):
            self._counters.metrics.values[self._counters.refusals[error.reason]] += 1.0
            return HttpError(503, str(error), (("Retry-After", "1"),))
        if isinstance(error, TooLarge):
            return HttpError(413, str(error))
        if isinstance(error, OutcomeUnknown):
            return HttpError(504, str(error))
        assert isinstance(error, HttpError)
        return error

    def refuse(self, exchange: Exchange, error: HttpError | InvalidEvent | NotConfirmed) -> None:
        """Answer with an error."""
        if isinstance(error, InvalidEvent):
            exchange.answer(422, write_json({"detail": error.faults}))
        else:
            exchange.fail(self.as_http(error))

    def _body(self, request: Request) -> bytes:
        if request.head.content_encoding is None:
            return request.body
        return decoded(request.head.content_encoding, request.body, self._settings.max_body_bytes)

    def _process(self, request: Request, exchange: Exchange) -> None:
        key = idempotency_key(request.head.idempotency_key)
        body = normalise_event(self._body(request), self._settings.max_preds)
        self.publish(_Post(body, self.message_id(body, key), self, exchange))

    def _process_batch(self, request: Request, exchange: Exchange) -> None:
        key = idempotency_key(request.head.idempotency_key)
        trouble = self._publisher.trouble()
        if trouble is not None:
            raise trouble
        lines = is_json_lines(request.head.content_type)
        events = normalise_batch(self._body(request), lines, self._settings.max_preds)
        _Batch(self, exchange, key, events).go_on()

    def message_id(self, body: bytes, key: bytes | None) -> bytes:
        """Of a normalised event: with a key it is the same at every retry, else random."""
        return next(self._uuids) if key is None else keyed_message_id(key, body)

    # Metrics

    def count_event(self, body: bytes, seconds: float) -> None:
        counters = self._counters
        values = counters.metrics.values
        values[counters.events] += 1.0
        values[counters.predictions] += count_rows(body)
        values[counters.event_bytes] += len(body)
        counters.confirm_seconds.observe(seconds)

    def answered(self, exchange: Exchange, status: int) -> None:
        counters = self._counters
        path = OTHER if exchange.head is None or exchange.head.path not in METHODS else exchange.head.path
        counters.metrics.values[counters.requests[path][status]] += 1.0
        if path == b"/process" and not exchange.refused:
            counters.request_seconds.observe(exchange.seconds())

    def _set_gauges(self) -> None:
        counters, publisher = self._counters, self._publisher
        values = counters.metrics.values
        values[counters.unconfirmed] = publisher.unconfirmed
        values[counters.unconfirmed_bytes] = publisher.unconfirmed_bytes
        values[counters.connected] = publisher.down is None
        values[counters.blocked] = bool(publisher.blocked)

    def tick(self, connections: int) -> None:
        """A few times a second: time-outs, and the gauges that another worker may be asked for."""
        self._counters.metrics.values[self._counters.connections] = connections
        self._publisher.sweep()
        self._counters.metrics.settle()
        self._set_gauges()
