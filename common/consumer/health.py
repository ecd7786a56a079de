"""The consumer's health port: /healthz, /readyz, /metrics."""

from __future__ import annotations

from common.consumer.metrics import Counters
from common.consumer.worker import Consumer
from common.errors import HttpError
from common.http.parser import Head, Limits, Request
from common.http.server import Exchange, ServerLimits
from common.metrics import CONTENT_TYPE as METRICS_TYPE


class Health:
    """The health port: /healthz, /readyz, /metrics."""

    def __init__(self, counters: Counters) -> None:
        self.consumer: Consumer | None = None
        self.no_consumer = "standby: another consumer owns the CSV"  # why there is none yet
        self._counters = counters

    def cannot_store(self, trouble: str) -> None:
        """Before there is a consumer, which tells its own troubles."""
        self.no_consumer = f"cannot store: {trouble}"
        self._counters.metrics.values[self._counters.store_ok] = 0.0

    def handle(self, request: Request, exchange: Exchange) -> None:
        path = request.head.path
        if path == b"/metrics":
            if self.consumer is not None:
                self.consumer.tick()
            exchange.answer(200, self._counters.metrics.render(), METRICS_TYPE)
            return
        if path == b"/readyz":
            reason = self.no_consumer if self.consumer is None else self.consumer.not_ready()
            if reason:
                raise HttpError(503, reason)
        exchange.answer(200, b'{"status":"alive"}' if path == b"/healthz" else b'{"status":"ready"}')

    def check(self, head: Head) -> None:
        if head.path not in (b"/healthz", b"/readyz", b"/metrics"):
            raise HttpError(404, "here are /healthz, /readyz and /metrics")
        if head.method not in (b"GET", b"HEAD"):
            raise HttpError(405, "this page takes GET, HEAD", (("Allow", "GET, HEAD"),))

    def answered(self, exchange: Exchange, status: int) -> None:
        """Nothing is counted here."""


HEALTH_LIMITS = ServerLimits(
    request=Limits(body_bytes=1024),
    connections=100,
    pipelined=8,
    buffered_bytes=2**20,
    head_seconds=5.0,
    body_seconds=5.0,
    idle_seconds=75.0,
    write_seconds=5.0,
)
