"""The bytes of an HTTP/1.1 response (RFC 9110, RFC 9112). Pure: no sockets, no clock."""

from __future__ import annotations

from functools import lru_cache
from http import HTTPStatus

JOINED_BYTES = 16 * 1024  # a smaller body costs less to join to its head than to write as a part of its own
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def encode_response(
    status: int,
    body: bytes = b"",
    content_type: bytes = b"application/json",
    date: bytes = b"",
    extra_headers: bytes = b"",
    *,
    keep_alive: bool = True,
    head_only: bool = False,
    http10: bool = False,
) -> tuple[bytes, ...]:
    """Return a whole response, in one part, or in two when its body is large, so that only the kernel copies that.

    `date` is an IMF-fixdate (RFC 9110 section 5.6.7), left out when empty. `extra_headers` are field lines, each with
    its CRLF. `head_only` makes the answer to HEAD, with the Content-Length of `body`. `http10` is that of the request.
    """
    prefix = _response_prefix(status, content_type, date, keep_alive, http10)
    if status == 204:  # has neither content nor Content-Length (RFC 9110 section 8.6)
        return (b"%b%b\r\n" % (prefix, extra_headers),)
    length = b"%d\r\n" % len(body)
    if head_only:
        body = b""
    if len(body) <= JOINED_BYTES:
        return (b"".join((prefix, length, extra_headers, b"\r\n", body)),)
    return b"".join((prefix, length, extra_headers, b"\r\n")), body


@lru_cache(64)
def _response_prefix(status: int, content_type: bytes, date: bytes, keep_alive: bool, http10: bool) -> bytes:
    """Return a response up to the value of Content-Length, as HTTP/1.1 for 1.0 clients too (RFC 9110 section 2.5)."""
    prefix = b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())
    if date:
        prefix += b"Date: %b\r\n" % date
    if not keep_alive:
        prefix += b"Connection: close\r\n"
    elif http10:
        prefix += b"Connection: keep-alive\r\n"
    if status == 204:
        return prefix
    return prefix + b"Content-Type: %b\r\nContent-Length: " % content_type
