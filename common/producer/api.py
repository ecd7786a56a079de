"""The producer's API: what each request means, its answer, and what is counted. Independent of sockets and the broker.

`Api` is the HTTP server's application. An accepted event goes to its partition's publisher; its confirm is the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from common import __version__
from common.config import ProducerSettings
from common.errors import HttpError, InvalidEvent, Unavailable
from common.event.document import write_json
from common.event.schema import normalise_event, normalise_in_stages
from common.http.coding import decoded, is_gzipped
from common.http.exchange import Exchange
from common.http.fields import NDJSON, idempotency_key, media_type
from common.http.parser import Head, Request
from common.http.tokens import Token, owner_of, parse_tokens
from common.http.turns import Job, Turns
from common.metrics import CONTENT_TYPE as METRICS_TYPE
from common.producer import openapi
from common.producer.intake import PARSED_FACTOR, Batch, Intake, retry_after
from common.producer.metrics import Counters
from common.producer.origins import Origins
from common.producer.publisher import Publisher
from common.producer.routes import OTHER, ROUTES

log = logging.getLogger("predlog.http")

PAGE = Path(__file__).parent / "page.html"
OPENAPI = Path(__file__).parent / "openapi.json"
# A plain event of up to this size costs less than a slice, whatever is in it.
WHOLE_BYTES = 16 * 1024
_KNOWN_METHODS = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"QUERY"}
)

_PROCESS = ROUTES[b"/process"]
Handler = Callable[[Request, Exchange], None]


class Api:
    """The application of the HTTP server. `rows` are the metrics of every worker."""

    def __init__(
        self,
        settings: ProducerSettings,
        publishers: Sequence[Publisher],
        counters: Counters,
        turns: Turns,
        rows: Sequence[Sequence[float]],
    ) -> None:
        self._settings = settings
        self._publishers = publishers
        self._counters = counters
        self._turns = turns
        self._rows = rows
        self._intake = Intake(publishers, counters)
        self._origins = Origins(settings.allowed_hosts, settings.cors_origins)
        self._tokens: list[Token]
        self._handlers: dict[bytes, Handler] = {path: getattr(self, f"_{route.name}") for path, route in ROUTES.items()}
        self._openapi_template = OPENAPI.read_text()
        self._starts = True
        self._stops = False
        self._page = PAGE.read_bytes()
        self._page_headers = openapi.page_headers(self._page)
        self.reload_tokens(settings.api_token)

    def reload_tokens(self, text: str) -> None:
        """Use the tokens of a new API_TOKEN value. Raise ValueError for a bad one, and keep those in force.

        In the metrics, names that were not there at the start are "other".
        """
        self._tokens = parse_tokens(text)
        self._is_open = not self._tokens and not self._settings.allowed_hosts
        self._document = openapi.document(self._openapi_template, __version__, self._settings, bool(self._tokens))

    # Requests

    def check(self, head: Head) -> bytes:
        """Raise HttpError if the head is reason enough to refuse; else return header lines for any answer to it."""
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
        route = ROUTES.get(head.path)
        if route is None:
            if head.path == b"*" and head.method == b"OPTIONS":
                return
            raise HttpError(404, "no such page; see /docs")
        if head.method not in route.methods:
            if head.method == b"OPTIONS" and cors:
                return  # a preflight
            if head.method not in _KNOWN_METHODS:
                raise HttpError(501, "no such method")
            allow = ", ".join(method.decode() for method in route.methods)
            raise HttpError(405, f"this page takes {allow}", (("Allow", allow),))
        if self._tokens and route.wants_token(self._settings.protect_pages):
            self._authorize(head)
        if route.takes:
            if media_type(head.content_type) not in route.takes:
                accepted = b" or ".join(route.takes).decode()
                fields = (("Accept", accepted.replace(" or ", ", ")),)
                raise HttpError(415, f"content must be {accepted}, in UTF-8", fields)
            is_gzipped(head.content_encoding)  # or else 415

    def _authorize(self, head: Head) -> None:
        given = head.authorization
        owner = None if given is None else owner_of(given, self._tokens)
        if owner is None:
            detail = "a bearer token is needed" if given is None else "this token is not known"
            challenge = 'Bearer realm="predlog"' + ("" if given is None else ', error="invalid_token"')
            raise HttpError(401, detail, (("WWW-Authenticate", challenge),))
        indices = self._counters.token_requests
        self._counters.metrics.values[indices.get(owner, indices[OTHER])] += 1.0
        log.debug("%s from %s", ROUTES[head.path].label, owner)

    def end_start(self) -> None:
        """Wait no longer for every partition: from now on /readyz is 200 while at least one takes events."""
        self._starts = False

    def announce_stop(self) -> None:
        """Let /readyz say that the server is shutting down. Events are accepted until it stops listening."""
        self._stops = True

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Answer a request, now or when its events have their outcome. Raise HttpError."""
        head = request.head
        if head.method != b"OPTIONS":
            self._handlers[head.path](request, exchange)
        elif head.path == b"*":
            exchange.answer(200, b"", extra=b"Allow: GET, HEAD, POST, OPTIONS\r\n")
        else:
            exchange.answer(204, b"", extra=self._origins.preflight)

    # Events

    def _process(self, request: Request, exchange: Exchange) -> None:
        key = idempotency_key(request.head.idempotency_key)
        if request.head.content_encoding is None and len(request.body) <= WHOLE_BYTES:
            try:
                event = normalise_event(request.body, self._settings.max_preds)
            except InvalidEvent as error:
                exchange.answer(422, write_json({"detail": error.faults}))
            else:
                self._intake.publish(event, key, exchange)
        else:
            self._in_turns(self._process_in_stages(request, key, exchange), request, exchange)

    def _process_in_stages(self, request: Request, key: bytes | None, exchange: Exchange) -> Job:
        body = decoded(request.head.content_encoding, request.body, self._settings.max_body_bytes)
        exchange.hold(len(body))
        yield None
        event = yield from normalise_in_stages(body, self._settings.max_preds)
        self._intake.publish(event, key, exchange)

    def _process_batch(self, request: Request, exchange: Exchange) -> None:
        key = idempotency_key(request.head.idempotency_key)
        troubles = self._troubles()
        if troubles[0] is not None and all(troubles):
            raise self._intake.as_http(troubles[0])
        batch = Batch(self._intake, exchange, key, self._settings.confirm_timeout_ms / 1000)
        self._in_turns(self._batch_in_stages(request, batch, exchange), request, exchange)

    def _batch_in_stages(self, request: Request, batch: Batch, exchange: Exchange) -> Job:
        head, settings = request.head, self._settings
        content = decoded(head.content_encoding, request.body, settings.max_body_bytes)
        exchange.hold(PARSED_FACTOR * len(content))
        yield None
        yield from batch.steps(content, media_type(head.content_type) == NDJSON, settings.max_preds)

    def _in_turns(self, job: Job, request: Request, exchange: Exchange) -> None:
        exchange.hold(len(request.body))
        self._turns.add(exchange.client, self._answered(job, exchange))

    def _answered(self, job: Job, exchange: Exchange) -> Job:
        """Run the job; answer 500 if it fails, as the server does for `handle`."""
        try:
            yield from job
        except InvalidEvent as error:
            exchange.answer(422, write_json({"detail": error.faults}))
        except HttpError as error:
            exchange.fail(error)
        except Exception:
            log.exception("a bug: %s was not finished", exchange.head.path.decode() if exchange.head else "a request")
            if exchange.response is None:
                exchange.fail(HttpError(500, "internal error; the log has the details"))

    # Pages

    def _healthz(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, b'{"status":"alive"}')

    def _readyz(self, request: Request, exchange: Exchange) -> None:
        if reason := self.not_ready():
            raise HttpError(503, reason, retry_after())
        # A load balancer that took this producer out would take it from the devices of all partitions.
        down = _named(self._troubles())
        exchange.answer(200, write_json({"status": "ready", "down": down}) if down else b'{"status":"ready"}')

    def _metrics(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, self.render_metrics(), METRICS_TYPE)

    def _openapi(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, self._document)

    def _docs(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, self._page, b"text/html; charset=utf-8", self._page_headers)

    def not_ready(self) -> str:
        """Return why no event can be accepted now, or "" if one can."""
        if self._stops:
            return "the server is shutting down"
        troubles = self._troubles()
        return _named(troubles) if all(troubles) or (self._starts and any(troubles)) else ""

    def _troubles(self) -> list[Unavailable | None]:
        """Return why each partition takes no event now, and None for one that does."""
        return [publisher.health.trouble for publisher in self._publishers]

    # Metrics

    def answered(self, exchange: Exchange, status: int) -> None:
        """Count an answer."""
        counters = self._counters
        route = None if exchange.head is None else ROUTES.get(exchange.head.path)
        counters.metrics.values[counters.requests[OTHER if route is None else route.label][status]] += 1.0
        if route is _PROCESS and not exchange.refused:
            counters.request_seconds.observe(exchange.seconds())

    def render_metrics(self) -> bytes:
        """Return the text exposition of all workers' metrics, with this one's up to date."""
        self._set_gauges()
        return self._counters.metrics.render(self._rows)

    def _set_gauges(self) -> None:
        counters, publishers = self._counters, self._publishers
        values = counters.metrics.values
        values[counters.unconfirmed] = sum(publisher.unconfirmed for publisher in publishers)
        values[counters.unconfirmed_bytes] = sum(publisher.unconfirmed_bytes for publisher in publishers)
        values[counters.connected] = all(publisher.connected for publisher in publishers)
        values[counters.blocked] = any(publisher.health.is_blocked for publisher in publishers)
        values[counters.stalled] = any(publisher.health.is_stalled for publisher in publishers)
        for index, publisher in zip(counters.partitions_up, publishers, strict=False):
            values[index] = publisher.health.trouble is None

    def tick(self, connections: int) -> None:
        """Act on time-outs, and set the gauges for whichever worker is scraped. Call it ten times a second."""
        self._counters.metrics.values[self._counters.connections] = connections
        for publisher in self._publishers:
            publisher.sweep()
        self._starts = self._starts and any(self._troubles())
        self._counters.metrics.settle()
        self._set_gauges()


def _named(troubles: Sequence[Unavailable | None]) -> str:
    """Return the reasons on one line, each with its partitions if there are several; "" without trouble."""
    by_why: dict[str, list[str]] = {}
    for number, trouble in enumerate(troubles):
        if trouble is not None:
            by_why.setdefault(trouble.why, []).append(str(number))
    if len(troubles) == 1:
        return "".join(by_why)
    return "; ".join(f"partition{'s'[len(ks) < 2 :]} {', '.join(ks)}: {why}" for why, ks in by_why.items())
