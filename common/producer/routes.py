"""What the producer answers: each path, its methods, and who may ask. Pure."""

from __future__ import annotations

from typing import NamedTuple

from common.http.fields import JSON, NDJSON

GET = (b"GET", b"HEAD")
POST = (b"POST",)


class Route(NamedTuple):
    """One path. `name` is that of its handler in `Api`, and its operationId in the OpenAPI document."""

    name: str
    label: str  # in the metrics
    methods: tuple[bytes, ...]
    takes: tuple[bytes, ...] = ()  # media types; only events have one
    is_page: bool = False  # that PROTECT_PAGES protects

    def wants_token(self, protect_pages: bool) -> bool:
        """Return whether a request needs a token, if any are set."""
        return bool(self.takes) or (self.is_page and protect_pages)


_PROCESS = Route("process", "/process", POST, takes=(JSON,))
ROUTES = {
    b"/process": _PROCESS,
    b"/process/": _PROCESS,  # as devices of the original call it
    b"/process/batch": Route("process_batch", "/process/batch", POST, takes=(JSON, NDJSON)),
    b"/healthz": Route("healthz", "/healthz", GET),
    b"/readyz": Route("readyz", "/readyz", GET),
    b"/metrics": Route("metrics", "/metrics", GET, is_page=True),
    b"/openapi.json": Route("openapi", "/openapi.json", GET, is_page=True),
    b"/docs": Route("docs", "/docs", GET, is_page=True),
}
OTHER = "other"  # the label of every other path
LABELS = (*dict.fromkeys(route.label for route in ROUTES.values()), OTHER)
