"""HTTP/1.1 request syntax, sans-IO (RFC 9110, RFC 9112): bytes in, requests out.

Strict: what two servers could read differently is refused, and nothing after it is read. The result never depends on
how a stream is cut into pieces. No sockets, clock, routes or media types here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from common.errors import HttpError


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """Bounds on one request. The parsers of a server share one instance, since heads are cached for each instance."""

    target_bytes: int = 8 * 1024  # else 414; RFC 9112 section 3 recommends at least 8,000 for a request line
    head_bytes: int = 16 * 1024  # else 431; a target, and as much again for a proxy's fields and a browser's cookies
    headers: int = 100  # else 431; as in Apache, and ten times what devices send
    body_bytes: int = 8 * 1024 * 1024  # else 413; without the chunked coding
    # Else 413; for a trailer section, 431. Chunk framing beyond what the data allows: as much as a head.
    chunk_overhead_bytes: int = 16 * 1024


@dataclass(frozen=True, slots=True)
class Head:
    """A request line and header section. Immutable: equal heads may be one object."""

    method: bytes
    target: bytes  # as received
    path: bytes  # percent-decoded, without the query; b"*" means the server as a whole
    query: bytes  # as received, without the "?"
    http10: bool
    keep_alive: bool
    content_length: int  # 0 without the field
    chunked: bool
    expect_continue: bool  # there is content, and the client may wait for 100 Continue before it sends it
    content_type: bytes | None
    content_encoding: bytes | None
    host: bytes | None  # that of the target, if it has one, or of the field; None in HTTP/1.0 only
    origin: bytes | None  # of the page that makes a browser send the request (Fetch standard, 3.2)
    sec_fetch_site: bytes | None  # the relation of that page to this server, set by the browser (Fetch Metadata, 2.3)
    idempotency_key: bytes | None
    authorization: bytes | None
    headers: tuple[tuple[bytes, bytes], ...]  # in order; names in lower case, values trimmed


class Request:
    """A complete request. `body` is without the chunked coding; a content coding is not undone."""

    __slots__ = ("body", "head")

    def __init__(self, head: Head, body: bytes) -> None:
        self.head = head
        self.body = body


_TCHAR = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# One rule as two patterns: a whole valid head, and the first fault, which ends at the byte that shows it.
_HEAD_LINES = re.compile(rb"(?:[\t -~\x80-\xff]*+\r\n)+")
_NOT_IN_HEAD = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f](?:(?<![\r\n])|(?<=\n)(?<!\r\n)|(?<=\r)[^\n])")

# No input makes these patterns backtrack far: what may follow a part never begins like that part. Only runs of one
# character class are possessive (*+, ++): CPython before 3.11.5 gets groups wrong (gh-106052); Debian 12 has 3.11.2.
# token = 1*tchar (RFC 9110 section 5.6.2)
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
# quoted-string = DQUOTE *( qdtext / quoted-pair ) DQUOTE (RFC 9110 section 5.6.4)
_QUOTED_STRING = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
# pchar = unreserved / pct-encoded / sub-delims / ":" / "@" (RFC 3986 section 3.3), and the slash between segments
_PCHARS = rb"A-Za-z0-9\-._~!$&'()*+,;=:@/"
_ESCAPE = rb"%[0-9A-Fa-f]{2}"
# uri-host [ ":" port ], without the comma that RFC 3986 allows in a host: a proxy can join two Host fields with one.
_HOST = rb"(?:\[[0-9A-Fa-f:.]++\]|(?:[A-Za-z0-9\-._~!$&'()*+;=]++|" + _ESCAPE + rb")+)(?::[0-9]{0,5})?"

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # before a request line (RFC 9112 section 2.2)
# request-line = method SP request-target SP HTTP-version (RFC 9112 section 3)
_REQUEST_LINE = re.compile(rb"(%b) ([!-~\x80-\xff]++) HTTP/([0-9])\.([0-9])" % TOKEN)
# Host = uri-host [ ":" port ] (RFC 9110 section 7.2); empty for a target without an authority
_HOST_VALUE = re.compile(rb"(?:%b)?" % _HOST)
# origin-form = absolute-path [ "?" query ], or absolute-form = absolute-URI, of http and https (RFC 9112 section 3.2).
# The query is ignored, so it has any form.
_TARGET = re.compile(rb"(?:(?i:https?)://(%b))?(/(?:[%b]++|%b)*)?(?:\?(.*+))?" % (_HOST, _PCHARS, _ESCAPE))
# chunk-size = 1*HEXDIG, then chunk-ext = *( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )
# (RFC 9112 section 7.1). 16 digits are 64 bits.
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:[ \t]*+;[ \t]*+%b(?:[ \t]*+=[ \t]*+(?:%b|%b))?)*\r\n" % (TOKEN, TOKEN, _QUOTED_STRING)
)

# Fields that change what a request means here, so two of one name are ambiguous. Connection is a list and may repeat.
_ONCE = frozenset(
    b"host content-length transfer-encoding expect content-type content-encoding idempotency-key authorization origin "
    b"sec-fetch-site".split()
)
_NOT_IN_TRAILERS = frozenset(b"host content-length transfer-encoding".split())  # RFC 9110 section 6.5.1

_METHOD_AND_VERSION_BYTES = 64  # in a request line, besides the target
# Each chunk costs about 2 µs, however small. Beyond `chunk_overhead_bytes`, chunks need 48 bytes of data.
_DATA_PER_FRAMING_BYTE = 8
_CACHED_HEADS = 1024
_CACHED_HEAD_BYTES = 1024


@lru_cache(256)
def _field(line: bytes) -> tuple[bytes, bytes]:
    """Split a field line (RFC 9112 section 5) into lower-case name and trimmed value. Raise HttpError 400.

    The caller has excluded CR, LF and control characters.
    """
    name, colon, value = line.partition(b":")
    if not colon or not name or name.translate(None, _TCHAR):
        raise HttpError(400, "malformed header line")
    return name.lower(), value.strip(b" \t")


@lru_cache(64)
def _request_line(line: bytes, target_bytes: int) -> tuple[bytes, bytes, bytes, bytes, bytes | None, bool]:
    """Return method, target, path, query, the target's host, and whether the version is 1.0 (RFC 9112 section 3).

    Raise HttpError 400, 414, 501 or 505.
    """
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HttpError(400, "malformed request line")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise HttpError(505, "only HTTP/1.1 and HTTP/1.0 are supported")
    if len(target) > target_bytes:
        raise HttpError(414, f"request target longer than {target_bytes} bytes")
    http10 = minor == b"0"  # a higher minor version is read as 1.1 (RFC 9110 section 6.2)
    if method == b"CONNECT":
        raise HttpError(501, "CONNECT is not implemented")
    if target == b"*" and method == b"OPTIONS":
        return method, target, target, b"", None, http10
    parts = _TARGET.fullmatch(target)
    if parts is None or not (parts[1] or parts[2]):
        raise HttpError(400, "malformed request target")
    path = parts[2] or b"/"
    return method, target, unquote_to_bytes(path) if b"%" in path else path, parts[3] or b"", parts[1], http10


def parse_head(raw: bytes, limits: Limits) -> Head:
    """Parse the head of a request, including the empty line at its end.

    The caller has checked `head_bytes`. Raise HttpError 400, 413, 414, 417, 431, 501 or 505.
    """
    if not _HEAD_LINES.fullmatch(raw):
        raise HttpError(400, "control character or bare line feed in the request head")
    request_line, *field_lines = raw[:-4].split(b"\r\n")
    if len(field_lines) > limits.headers:
        raise HttpError(431, f"more than {limits.headers} header lines")

    method, target, path, query, target_host, http10 = _request_line(request_line, limits.target_bytes)

    headers = []
    once: dict[bytes, bytes] = {}
    connection = b""
    for line in field_lines:
        field = name, value = _field(line)
        headers.append(field)
        if name in _ONCE:
            if name in once:
                raise HttpError(400, f"more than one {name.decode()} header")
            once[name] = value
        elif name == b"connection":
            connection += b"," + value

    host = once.get(b"host")
    if host is None:
        if not http10:
            raise HttpError(400, "no Host header")
    elif not _HOST_VALUE.fullmatch(host):
        raise HttpError(400, "malformed Host header")
    if target_host is not None:
        host = target_host  # and not the field (RFC 9112 section 3.2.2)

    content_length, chunked = _content(once, http10, limits)
    expect = None if http10 else once.get(b"expect")  # RFC 9110 section 10.1.1: ignored in HTTP/1.0
    if expect is not None and expect.lower() != b"100-continue":
        raise HttpError(417, "the only expectation that can be met is 100-continue")
    options = {option.strip(b" \t") for option in connection.lower().split(b",")} if connection else ()
    return Head(
        method,
        target,
        path,
        query,
        http10,
        b"close" not in options and (not http10 or b"keep-alive" in options),
        content_length,
        chunked,
        expect is not None and (chunked or content_length > 0),
        once.get(b"content-type"),
        once.get(b"content-encoding"),
        host,
        once.get(b"origin"),
        once.get(b"sec-fetch-site"),
        once.get(b"idempotency-key"),
        once.get(b"authorization"),
        tuple(headers),
    )


def _content(fields: dict[bytes, bytes], http10: bool, limits: Limits) -> tuple[int, bool]:
    """Return the content's length, and whether it is chunked (RFC 9112 section 6.3). Raise HttpError 400, 413, 501."""
    coding = fields.get(b"transfer-encoding")
    length = fields.get(b"content-length")
    if coding is not None:
        if http10 or length is not None:
            raise HttpError(400, "Transfer-Encoding in HTTP/1.0, or beside Content-Length")
        if coding.lower() == b"chunked":
            return 0, True
        codings = [name.strip(b" \t") for name in coding.lower().split(b",")]
        if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
            raise HttpError(400, "the last transfer coding must be chunked, once")
        raise HttpError(501, "the only transfer coding supported is chunked")
    if length is None:
        return 0, False
    if not length.isdigit():
        raise HttpError(400, "malformed Content-Length header")
    if len(length) > 19 or int(length) > limits.body_bytes:
        raise HttpError(413, f"content longer than {limits.body_bytes} bytes")
    return int(length), False


_parse_head_cached = lru_cache(_CACHED_HEADS)(parse_head)


class _ChunkedContent:
    """Chunked content, decoded as it arrives (RFC 9112 section 7.1). Trailer fields are checked and dropped."""

    __slots__ = ("_due_bytes", "_framing_bytes", "_in_trailers", "_limits", "complete", "data")

    def __init__(self, limits: Limits) -> None:
        self.data = bytearray()
        self.complete = False
        self._limits = limits
        self._due_bytes = 0  # still to come of the current chunk and its line end
        self._in_trailers = False
        self._framing_bytes = 0  # so far: of chunks, then of trailers

    def receive(self, buffer: bytearray) -> None:
        """Consume what has come of the content. Raise HttpError 400, 413 or 431."""
        start = 0
        while not self.complete:
            if self._due_bytes:
                piece = buffer[start : start + self._due_bytes]
                start += len(piece)
                self.data += piece
                self._due_bytes -= len(piece)
                if self._due_bytes:
                    break
                if not self.data.endswith(b"\r\n"):
                    raise HttpError(400, "chunk longer than its size")
                del self.data[-2:]
            end = buffer.find(b"\n", start) + 1
            self._bound_framing((end or len(buffer)) - start)
            if not end:
                break
            self._framing_bytes += end - start
            line = bytes(buffer[start:end])
            start = end
            if self._in_trailers:
                self._read_trailer_line(line)
            else:
                self._read_size_line(line)
        del buffer[:start]

    def _bound_framing(self, line_bytes: int) -> None:
        most_bytes = self._limits.chunk_overhead_bytes
        bought_bytes = 0 if self._in_trailers else len(self.data) // _DATA_PER_FRAMING_BYTE
        if line_bytes > min(most_bytes, most_bytes + bought_bytes - self._framing_bytes):
            if self._in_trailers:
                raise HttpError(431, "trailer section too long")
            raise HttpError(413, "too much chunk framing for too little content")

    def _read_size_line(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise HttpError(400, "malformed chunk size line")
        chunk_bytes = int(match[1], 16)
        if len(self.data) + chunk_bytes > self._limits.body_bytes:
            raise HttpError(413, f"content longer than {self._limits.body_bytes} bytes")
        if chunk_bytes:
            self._due_bytes = chunk_bytes + 2
            self._framing_bytes += 2
        else:
            self._in_trailers = True
            self._framing_bytes = 0

    def _read_trailer_line(self, line: bytes) -> None:
        if line == b"\r\n":
            self.complete = True
            return
        if not _HEAD_LINES.fullmatch(line):
            raise HttpError(400, "control character or bare line feed in the trailer section")
        name, _ = _field(line[:-2])
        if name in _NOT_IN_TRAILERS:
            raise HttpError(400, f"{name.decode()} in the trailer section")


class RequestParser:
    """A parser of the requests of one connection, in order.

    `receive_data` only stores. A caller that leaves requests in the parser must stop reading, by `buffered_bytes`. Once
    `next_request` returned None, at most one incomplete request is stored, within the limits. After an error, and after
    a request without keep-alive (RFC 9112 section 9.6), the parser must not be used again.
    """

    def __init__(self, limits: Limits) -> None:
        self.head: Head | None = None  # of the request whose content is not complete yet
        self.idle = True  # nothing has arrived after the requests returned
        self._limits = limits
        self._request_line_bytes = min(limits.target_bytes + _METHOD_AND_VERSION_BYTES, limits.head_bytes - 2)
        self._quick_head_bytes = min(_CACHED_HEAD_BYTES, self._request_line_bytes)
        self._buffer: bytes | bytearray = b""  # bytes as received, until they turn out not to be one whole request
        self._searched_bytes = 0  # of the buffer, in which no head ends
        self._chunked: _ChunkedContent | None = None

    @property
    def buffered_bytes(self) -> int:
        """The number of bytes stored for requests not returned yet."""
        return len(self._buffer) + (len(self._chunked.data) if self._chunked else 0)

    def begins_no_request(self) -> bool:
        """Return whether nothing came after the requests that were returned, or half of an empty line."""
        return self.idle or self._buffer == b"\r"

    def receive_data(self, data: bytes) -> None:
        """Store bytes from the socket."""
        self.idle = False
        self._buffer += data

    def next_request(self) -> Request | None:
        """Return the next complete request, or None if that needs more data.

        Raise HttpError 400, 413, 414, 417, 431, 501 or 505: the connection must close.
        """
        buffer = self._buffer
        if type(buffer) is bytes:
            # The fast path, for one whole request in one piece. The general code below does the same.
            end = buffer.find(b"\r\n\r\n") + 4
            if 4 < end <= self._quick_head_bytes and self.head is None and buffer[0] > 13:
                whole = _parse_head_cached(buffer[:end], self._limits)
                if end + whole.content_length == len(buffer) and not whole.chunked:
                    self._buffer = b""
                    self.idle = True
                    return Request(whole, buffer[end:])
            buffer = bytearray(buffer)
        assert isinstance(buffer, bytearray)
        head = self.head or self._next_head(buffer)
        body = None if head is None else self._next_body(head, buffer)
        self.head = head if body is None else None
        self._buffer = buffer or b""
        self.idle = not buffer and self.head is None
        return None if head is None or body is None else Request(head, body)

    def _next_head(self, buffer: bytearray) -> Head | None:
        if skipped := _EMPTY_LINES.match(buffer):
            del buffer[: skipped.end()]
        if buffer.startswith(b"\n"):  # a CR before it may have belonged to the content
            raise HttpError(400, "bare line feed before a request")
        end = buffer.find(b"\r\n\r\n", max(0, self._searched_bytes - 3)) + 4
        if end < 4:
            self._refuse_early(buffer, len(buffer))
            self._searched_bytes = len(buffer)
            return None
        if end > self._request_line_bytes:
            self._refuse_early(buffer, end)
        raw = bytes(buffer[:end])
        del buffer[:end]
        self._searched_bytes = 0
        head = (_parse_head_cached if end <= _CACHED_HEAD_BYTES else parse_head)(raw, self._limits)
        if head.chunked:
            self._chunked = _ChunkedContent(self._limits)
        return head

    def _refuse_early(self, buffer: bytearray, stop: int) -> None:
        """Refuse a head, complete or not, that is too long or has an invalid byte before `stop`.

        Of several faults the first in the stream counts, so the pieces it comes in make no difference.
        """
        limits = self._limits
        bad = _NOT_IN_HEAD.search(buffer, max(0, self._searched_bytes - 1), stop)
        reach_bytes = bad.end() - 1 if bad else stop
        line_stop = self._request_line_bytes + 2
        if reach_bytes >= line_stop and buffer.find(b"\r\n", 0, line_stop) < 0:
            raise HttpError(414, f"request target longer than {limits.target_bytes} bytes")
        if reach_bytes > limits.head_bytes:
            raise HttpError(431, f"request head longer than {limits.head_bytes} bytes")
        if bad:
            raise HttpError(400, "control character or bare line feed in the request head")

    def _next_body(self, head: Head, buffer: bytearray) -> bytes | None:
        if self._chunked is not None:
            self._chunked.receive(buffer)
            if not self._chunked.complete:
                return None
            body = bytes(self._chunked.data)
            self._chunked = None
            return body
        size = head.content_length
        if size > len(buffer):
            return None
        body = bytes(memoryview(buffer)[:size])  # a single copy
        del buffer[:size]
        return body
