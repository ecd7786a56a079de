"""Which web pages may make a browser send requests, and which Host values are served. Pure.

A page of another site can make a visitor's browser send a POST without a preflight, as long as it looks like a form's
(Fetch standard, "CORS-safelisted"). So a request across sites is refused unless its origin is listed.
"""

from __future__ import annotations

from common.errors import HttpError
from common.http.parser import Head

_SAFE = frozenset({b"GET", b"HEAD"})
_DEFAULT_PORTS = {b"http": b":80", b"https": b":443"}
_PREFLIGHT = (
    b"Access-Control-Allow-Methods: POST\r\n"
    b"Access-Control-Allow-Headers: Authorization, Content-Type, Content-Encoding, Idempotency-Key, traceparent, "
    b"tracestate, X-Requested-With\r\n"
    b"Access-Control-Max-Age: 600\r\n"
)


class Origins:
    """The policy of ALLOWED_HOSTS and CORS_ORIGINS, both lists separated by commas."""

    preflight = _PREFLIGHT

    def __init__(self, allowed_hosts: str, cors_origins: str) -> None:
        self._hosts = frozenset(host.lower().encode() for host in allowed_hosts.split(",") if host)
        self._origins = frozenset(origin.lower().encode() for origin in cors_origins.split(",") if origin)
        # A cache must not give one origin's page another's answer (Fetch standard, "CORS protocol and HTTP caches").
        self._vary = b"Vary: Origin\r\n" if self._origins else b""

    def check(self, head: Head) -> bytes:
        """Return the header lines that let a listed origin read the answer. Raise HttpError 403."""
        if self._hosts and _name(head.host) not in self._hosts:
            raise HttpError(403, f"this Host is not served (ALLOWED_HOSTS): {_shown(head.host)}")
        origin = head.origin
        if origin is not None and origin.lower() in self._origins:
            return (
                b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: Retry-After\r\nVary: Origin\r\n"
                % origin
            )
        if head.method in _SAFE:
            return self._vary  # links may lead here from anywhere, and the browser lets no other page read the answer
        if head.sec_fetch_site is not None:
            # The browser sets this field and no page can. It also holds behind a proxy that changes Host.
            is_own = head.sec_fetch_site in (b"same-origin", b"none")
        else:
            is_own = origin is None or _is_own(origin, head.host)
        if is_own:
            return b""
        shown = f"Origin: {_shown(origin)}; Host: {_shown(head.host)}"
        raise HttpError(403, f"a page of another origin may not do this unless CORS_ORIGINS lists it ({shown})")


def _is_own(origin: bytes, host: bytes | None) -> bool:
    """Return whether an Origin value names the host that was called. Any scheme will do, as a proxy can hide it."""
    scheme, _, named = origin.lower().partition(b"://")
    port = _DEFAULT_PORTS.get(scheme)
    if port is None or not named or host is None:
        return False
    return named.removesuffix(port) == host.lower().removesuffix(port)


def _shown(value: bytes | None) -> str:
    return "none" if value is None else value.decode("latin-1")


def _name(host: bytes | None) -> bytes:
    """Return a Host value in lower case, without its port."""
    if host is None:
        return b""
    name, colon, port = host.lower().rpartition(b":")
    return name if colon and port.isdigit() and not name.endswith(b":") else host.lower()
