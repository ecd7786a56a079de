"""The producer's API: what each request means, its answer, and what is counted. Knows no socket and no broker.

`Api` is the HTTP server's application. An accepted event goes to its partition's publisher, whose confirm answers the
exchange.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from common import __version__
from common.config import ProducerSettings
from common.errors import HttpError, InvalidEvent, NotConfirmed, Unavailable
from common.event.document import write_json
from common.event.schema import NormalEvent, normalise_event, normalise_in_steps
from common.http.coding import decoded, require_known_coding
from common.http.fields import idempotency_key, is_json_lines, require_json
from common.http.parser import Head, Request
from common.http.server import Exchange
from common.metrics import CONTENT_TYPE as METRICS_TYPE
from common.producer import openapi
from common.producer.batch import Batch
from common.producer.intake import Intake
from common.producer.metrics import METHODS, OTHER, Counters
from common.producer.origins import PROBES, Origins
from common.producer.publisher import Publication, Publisher
from common.producer.slices import Job, Slices

log = logging.getLogger("predlog.http")

HTML = b"text/html; charset=utf-8"
PAGE = Path(__file__).parent / "page.html"
# A plain event of this size costs less than a slice, whatever is in it.
WHOLE_BYTES = 16 * 1024
# An event of this size is read in one step: 20 ms for the worst. More steps would cost one with images 2 % of its time.
ONE_STEP_BYTES = 192 * 1024
_KNOWN_METHODS = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"QUERY"}
)
_PAGES = frozenset({b"/metrics", b"/openapi.json", b"/docs"})


class _Post(Publication):
    """The event of a POST /process."""

    __slots__ = ("_event", "_exchange", "_intake")

    def __init__(self, event: NormalEvent, message_id: bytes, intake: Intake, exchange: Exchange) -> None:
        self.body = event.body
        self.message_id = message_id
        self._event = event
        self._intake = intake
        self._exchange = exchange

    def confirmed(self, seconds: float) -> None:
        self._intake.count(self._event, seconds)
        self._exchange.answer(200, self.body)

    def failed(self, error: NotConfirmed) -> None:
        self._exchange.fail(self._intake.as_http(error))


class Api:
    """The application of the HTTP server. `rows` are the metrics of every worker."""

    def __init__(
        self,
        settings: ProducerSettings,
        publishers: Sequence[Publisher],
        counters: Counters,
        slices: Slices,
        rows: Sequence[Sequence[float]],
    ) -> None:
        self._settings = settings
        self._max_preds = settings.max_preds
        self._publishers = publishers
        self._only_publisher = publishers[0] if len(publishers) == 1 else None
        self._counters = counters
        self._slices = slices
        self._rows = rows
        self._intake = Intake(publishers, counters)
        self._origins = Origins(settings.allowed_hosts, settings.cors_origins)
        self.reload_tokens(settings.api_token)
        self._openapi = write_json(openapi.document(__version__, settings))
        self._starts = True
        self._stops = False
        self._page = PAGE.read_bytes()
        self._page_headers = openapi.page_headers(self._page)

    # Requests

    def check(self, head: Head) -> bytes:
        """Raise HttpError if the head alone decides that; else return header lines for any answer to the request."""
        if (
            head.origin is None
            and head.sec_fetch_site is None
            and head.content_type == b"application/json"
            and head.content_encoding is None
            and head.method == b"POST"
            and head.path == b"/process"
            and self._is_open
        ):
            return b""  # the fast path, for what nearly all devices send
        cors = self._origins.check(head)
        try:
            self._check(head, cors)
        except HttpError as error:
            error.fields += cors
            raise
        return cors

    def _check(self, head: Head, cors: bytes) -> None:
        methods = METHODS.get(head.path)
        if methods is None:
            if head.path == b"*" and head.method == b"OPTIONS":
                return
            raise HttpError(404, "no such page; see /docs")
        if head.method not in methods:
            if head.method == b"OPTIONS" and cors:
                return  # a preflight
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

    def is_probe(self, head: Head) -> bool:
        """Tell whether an orchestrator asks for liveness or readiness."""
        return head.path in PROBES and head.method in METHODS[head.path]

    def _authorize(self, given: bytes | None) -> None:
        if given is not None and given[:7].lower() == b"bearer ":
            given = b"Bearer " + given[7:].strip()
            # Every token is compared, each in constant time.
            if sum([hmac.compare_digest(given, token) for token in self._tokens]):
                return
        detail = "a bearer token is needed" if given is None else "this token is not known"
        challenge = 'Bearer realm="predlog"' + ("" if given is None else ', error="invalid_token"')
        raise HttpError(401, detail, (("WWW-Authenticate", challenge),))

    def reload_tokens(self, text: str) -> None:
        """Take the value of API_TOKEN."""
        self._tokens = [b"Bearer " + token.encode() for token in text.split(",") if token]
        self._is_open = not self._tokens and not self._settings.allowed_hosts

    def end_start(self) -> None:
        """Wait no longer for every partition: from now on /readyz says 200 while one takes events."""
        self._starts = False

    def announce_stop(self) -> None:
        """Let /readyz say that the server is shutting down. Events are accepted until it stops listening."""
        self._stops = True

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer a request, now or when its events have their outcome. Raise HttpError."""
        head = request.head
        path = head.path
        if path == b"/process" and head.method == b"POST":
            if head.content_encoding is None and len(request.body) <= WHOLE_BYTES:
                self._process(request.body, idempotency_key(head.idempotency_key), exchange)
            else:
                self._in_slices(self._process_in_steps(request, exchange), request, exchange)
        elif head.method == b"OPTIONS":
            if path == b"*":
                exchange.answer(200, b"", extra=b"Allow: GET, HEAD, POST, OPTIONS\r\n")
            else:
                exchange.answer(204, b"", extra=self._origins.preflight)
        elif path == b"/process/batch":
            self._process_batch(request, exchange)
        elif path == b"/healthz":
            exchange.answer(200, b'{"status":"alive"}')
        elif path == b"/readyz":
            self._answer_readiness(exchange)
        elif path == b"/metrics":
            exchange.answer(200, self.render_metrics(), METRICS_TYPE)
        elif path == b"/openapi.json":
            exchange.answer(200, self._openapi)
        else:
            exchange.answer(200, self._page, HTML, self._page_headers)

    def _process(self, body: bytes, key: bytes | None, exchange: Exchange) -> None:
        try:
            event = normalise_event(body, self._max_preds)
        except InvalidEvent as error:
            exchange.answer(422, write_json({"detail": error.faults}))
        else:
            self._publish(event, key, exchange)

    def _publish(self, event: NormalEvent, key: bytes | None, exchange: Exchange) -> None:
        try:
            publisher = self._only_publisher or self._intake.publisher_for(event)
            publisher.publish(_Post(event, self._intake.message_id(event, key), self._intake, exchange))
        except NotConfirmed as error:
            # The traceback's frames hold the event and the error: a cycle that would keep both until a collection.
            error.__traceback__ = None
            exchange.fail(self._intake.as_http(error))

    def _process_in_steps(self, request: Request, exchange: Exchange) -> Job:
        key = idempotency_key(request.head.idempotency_key)
        body = yield from decoded(request.head.content_encoding, request.body, self._settings.max_body_bytes)
        exchange.hold(len(body))
        yield None
        if len(body) <= ONE_STEP_BYTES:
            self._process(body, key, exchange)
            return
        try:
            event = yield from normalise_in_steps(body, self._max_preds)
        except InvalidEvent as error:
            faults = error.faults
        else:
            yield None
            self._publish(event, key, exchange)
            return
        yield None
        exchange.answer(422, write_json({"detail": faults}))

    def _process_batch(self, request: Request, exchange: Exchange) -> None:
        head, settings = request.head, self._settings
        key = idempotency_key(head.idempotency_key)
        troubles = self._troubles()
        if len(troubles) == len(self._publishers):
            raise self._intake.as_http(troubles[0])
        batch = Batch(self._intake, exchange, key, settings.confirm_timeout_ms / 1000)
        lines = is_json_lines(head.content_type)
        steps = batch.steps(request.body, head.content_encoding, lines, settings.max_body_bytes, settings.max_preds)
        self._in_slices(steps, request, exchange)

    def _in_slices(self, job: Job, request: Request, exchange: Exchange) -> None:
        exchange.hold(len(request.body))
        self._slices.add(exchange.client, self._answered(job, exchange))

    def _answered(self, job: Job, exchange: Exchange) -> Job:
        """Run the job; answer 500 if it fails, as the server does for `handle`."""
        try:
            yield from job
        except HttpError as error:
            exchange.fail(error)
        except Exception:
            log.exception("a bug: %s was not finished", exchange.head.path.decode() if exchange.head else "a request")
            if exchange.response is None:
                exchange.fail(HttpError(500, "internal error; the log has the details"))

    def _answer_readiness(self, exchange: Exchange) -> None:
        if reason := self.not_ready():
            raise HttpError(503, reason, (("Retry-After", "1"),))
        down = self._down()
        exchange.answer(200, write_json({"status": "ready", **({"down": down} if down else {})}))

    def not_ready(self) -> str:
        """Return why no event could be accepted now, or ""."""
        if self._stops:
            return "the server is shutting down"
        # A load balancer that took this producer out for one partition would take it from the devices of all.
        return self._down() if self._starts or len(self._troubles()) == len(self._publishers) else ""

    def _down(self) -> str:
        """Return why events are refused, and of several partitions which; "" if none are."""
        return _named([publisher.trouble() for publisher in self._publishers])

    def _troubles(self) -> list[Unavailable]:
        return [trouble for publisher in self._publishers if (trouble := publisher.trouble()) is not None]

    # Metrics

    def answered(self, exchange: Exchange, status: int) -> None:
        """Count an answer."""
        counters = self._counters
        path = OTHER if exchange.head is None or exchange.head.path not in METHODS else exchange.head.path
        counters.metrics.values[counters.requests[path][status]] += 1.0
        if path == b"/process" and not exchange.refused:
            counters.request_seconds.observe(exchange.seconds())

    def render_metrics(self) -> bytes:
        """Return the page of the metrics."""
        self._set_gauges()
        return self._counters.metrics.render(self._rows)

    def _set_gauges(self) -> None:
        counters, publishers = self._counters, self._publishers
        values = counters.metrics.values
        values[counters.unconfirmed] = sum(publisher.unconfirmed for publisher in publishers)
        values[counters.unconfirmed_bytes] = sum(publisher.unconfirmed_bytes for publisher in publishers)
        values[counters.connected] = all(publisher.connected for publisher in publishers)
        values[counters.blocked] = any(publisher.is_blocked for publisher in publishers)
        values[counters.stalled] = any(publisher.is_stalled for publisher in publishers)
        values[counters.reconnects] = sum(publisher.links_lost for publisher in publishers)
        for index, publisher in zip(counters.partitions_up, publishers, strict=False):
            values[index] = publisher.trouble() is None

    def tick(self, connections: int) -> None:
        """Act on time-outs, and set the gauges for whichever worker is scraped. Call it ten times a second."""
        self._counters.metrics.values[self._counters.connections] = connections
        for publisher in self._publishers:
            publisher.sweep()
        self._starts = self._starts and bool(self._troubles())
        self._counters.metrics.settle()
        self._set_gauges()


def _named(troubles: Sequence[Unavailable | None]) -> str:
    """Say why, and of several partitions which."""
    by_why: dict[str, list[str]] = {}
    for number, trouble in enumerate(troubles):
        if trouble is not None:
            by_why.setdefault(trouble.why, []).append(str(number))
    if len(troubles) == 1:
        return "".join(by_why)
    return "; ".join(f"partition{'s'[len(ks) < 2 :]} {', '.join(ks)}: {why}" for why, ks in by_why.items())
