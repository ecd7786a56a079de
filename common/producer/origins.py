"""Who a browser says it acts for: which pages may make requests, and by which names we may be called. Pure.

A page of another site can make a visitor's browser send a POST without asking first, as long as it looks like a form's
(Fetch standard, "CORS-safelisted"): so a request that comes across sites is refused unless its origin is listed.
"""

from __future__ import annotations

from common.errors import HttpError
from common.http.parser import Head

_SAFE = frozenset({b"GET", b"HEAD"})
_PROBES = frozenset({b"/healthz", b"/readyz"})  # orchestrators call them by address
_PREFLIGHT = (
    b"Access-Control-Allow-Methods: POST\r\n"
    b"Access-Control-Allow-Headers: Authorization, Content-Type, Content-Encoding, Idempotency-Key\r\n"
    b"Access-Control-Max-Age: 600\r\n"
)


class Origins:
    """`allowed_hosts` and `cors_origins` are lists separated by commas, as the settings have them."""

    preflight = _PREFLIGHT

    def __init__(self, allowed_hosts: str, cors_origins: str) -> None:
        self._hosts = frozenset(host.lower().encode() for host in allowed_hosts.split(",") if host)
        self._origins = frozenset(origin.lower().encode() for origin in cors_origins.split(",") if origin)

    def check(self, head: Head) -> bytes:
        """Return the header lines that let a listed origin read the answer. Raises HttpError 403."""
        if self._hosts and head.path not in _PROBES and _name(head.host) not in self._hosts:
            raise HttpError(403, "this server is not called by that Host (ALLOWED_HOSTS)")
        origin = head.origin
        if origin is not None and origin.lower() in self._origins:
            return (
                b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: Retry-After\r\nVary: Origin\r\n"
                % origin
            )
        if head.method in _SAFE:
            return b""  # a link leads here from anywhere; what a page reads, the browser decides
        if head.sec_fetch_site is not None:
            # The browser's own word, which no page can set: right also where a proxy puts another Host in.
            foreign = head.sec_fetch_site not in (b"same-origin", b"none")
        else:
            named = None if origin is None else origin.lower().partition(b"://")[2]
            foreign = named is not None and (head.host is None or named != head.host.lower())
        if foreign:
            raise HttpError(403, "a page of another origin may not do this unless CORS_ORIGINS lists it")
        return b""


def _name(host: bytes | None) -> bytes:
    """A Host value in lower case, without its port."""
    if host is None:
        return b""
    name, colon, port = host.lower().rpartition(b":")
    return name if colon and port.isdigit() and not name.endswith(b":") else host.lower()
