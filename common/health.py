"""The application behind a health port: /healthz, /readyz and /metrics of either process."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import HttpError
from common.http.exchange import Exchange
from common.http.parser import Head, Limits, Request
from common.http.phases import ServerLimits
from common.metrics import CONTENT_TYPE as METRICS_TYPE


class Health:
    """The application behind a health port. `not_ready` returns why the process cannot do its work now, or ""."""

    def __init__(self, not_ready: Callable[[], str], metrics: Callable[[], bytes]) -> None:
        self._not_ready = not_ready
        self._metrics = metrics

    def handle(self, request: Request, exchange: Exchange) -> None:
        path = request.head.path
        if path == b"/metrics":
            exchange.answer(200, self._metrics(), METRICS_TYPE)
        elif path == b"/healthz":
            exchange.answer(200, b'{"status":"alive"}')
        elif reason := self._not_ready():
            raise HttpError(503, reason)
        else:
            exchange.answer(200, b'{"status":"ready"}')

    def check(self, head: Head) -> bytes:
        """Raise HttpError for anything but a GET or HEAD of one of the pages."""
        if head.path not in (b"/healthz", b"/readyz", b"/metrics"):
            raise HttpError(404, "this port serves /healthz, /readyz and /metrics")
        if head.method not in (b"GET", b"HEAD"):
            raise HttpError(405, "this page takes GET, HEAD", (("Allow", "GET, HEAD"),))
        return b""

    def answered(self, exchange: Exchange, status: int) -> None:
        """Count nothing: the health port has no metrics of its own."""


HEALTH_LIMITS = ServerLimits(request=Limits(body_bytes=1024), connections=100, buffered_bytes=2**20, idle_seconds=75.0)
