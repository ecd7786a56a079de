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
    # Else 413, for a trailer section 431. Chunk framing beyond what data allows: as much as a head.
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
    """A complete request. `body` is without the chunked coding; a content coding is left on."""

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
# Without the comma that RFC 3986 allows in a host, since an intermediary may join two Host fields with one.
_HOST = rb"(?:\[[0-9A-Fa-f:.]++\]|(?:[A-Za-z0-9\-._~!$&'()*+;=]++|" + _ESCAPE + rb")+)"

_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # before a request line (RFC 9112 section 2.2)
# request-line = method SP request-target SP HTTP-version (RFC 9112 section 3)
_REQUEST_LINE = re.compile(rb"(%b) ([!-~\x80-\xff]++) HTTP/([0-9])\.([0-9])" % TOKEN)
# origin-form = absolute-path [ "?" query ] (RFC 9112 section 3.2.1). The query is ignored, so it has any form.
_ORIGIN_FORM = re.compile(rb"(/(?:[%b]++|%b)*)(?:\?(.*+))?" % (_PCHARS, _ESCAPE))
# absolute-form = absolute-URI (RFC 9112 section 3.2.2), of http and https
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://(%b(?::[0-9]{0,5})?)([/?].*+)?" % _HOST)
# authority-form = uri-host ":" port (RFC 9112 section 3.2.3)
_AUTHORITY_FORM = re.compile(rb"%b:[0-9]{1,5}" % _HOST)
# Host = uri-host [ ":" port ] (RFC 9110 section 7.2); empty for a target without an authority
_HOST_VALUE = re.compile(rb"(?:%b(?::[0-9]{0,5})?)?" % _HOST)
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
        if line[:1] in (b" ", b"\t"):
            raise HttpError(400, "folded or indented header line")
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
    path, query, host = _target(method, target)
    # A higher minor version is read as 1.1 (RFC 9110 section 6.2).
    return method, target, path, query, host, minor == b"0"


def _target(method: bytes, target: bytes) -> tuple[bytes, bytes, bytes | None]:
    """Return path, query and host (if any) of a request target in one of its four forms (RFC 9112 section 3.2).

    Raise HttpError 400, and 501 for CONNECT.
    """
    if method == b"CONNECT":
        if _AUTHORITY_FORM.fullmatch(target):
            raise HttpError(501, "CONNECT is not implemented")
        raise HttpError(400, "malformed request target")
    if target == b"*":
        if method == b"OPTIONS":
            return b"*", b"", None
        raise HttpError(400, "only OPTIONS may have the target *")
    host = None
    if absolute := _ABSOLUTE_FORM.fullmatch(target):
        host, target = absolute[1], absolute[2] or b""
        if not target and method == b"OPTIONS":
            return b"*", b"", host  # RFC 9112 section 3.2.4
        if not target.startswith(b"/"):
            target = b"/" + target
    origin = _ORIGIN_FORM.fullmatch(target)
    if origin is None:
        raise HttpError(400, "malformed request target")
    path, query = origin.groups(b"")
    return unquote_to_bytes(path) if b"%" in path else path, query, host


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
    """Return the length of the content, and whether it is chunked instead (RFC 9112 section 6.3, strictly).

    Raise HttpError 400, 413 or 501.
    """
    coding = fields.get(b"transfer-encoding")
    length = fields.get(b"content-length")
    if coding is not None:
        if http10:
            raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
        if length is not None:
            raise HttpError(400, "both Transfer-Encoding and Content-Length")
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

    __slots__ = ("_chunk_bytes", "_expects", "_framing_bytes", "_limits", "complete", "data")

    def __init__(self, limits: Limits) -> None:
        self.data = bytearray()
        self.complete = False
        self._limits = limits
        self._expects = "size line"  # or "data", "data end", "trailer line"
        self._chunk_bytes = 0  # still to come of the current chunk
        self._framing_bytes = limits.chunk_overhead_bytes  # still allowed; data allows more

    def receive(self, buffer: bytes | bytearray, start: int) -> int:
        """Read `buffer` from `start` on. Return the offset of what is not consumed.

        Raise HttpError 400, 413 or 431.
        """
        while not self.complete:
            if self._expects == "data":
                piece = buffer[start : start + self._chunk_bytes]
                start += len(piece)
                self.data += piece
                self._chunk_bytes -= len(piece)
                if self._chunk_bytes:
                    break
                self._expects = "data end"
            if self._expects == "data end":
                line_end = buffer[start : start + 2]
                if not b"\r\n".startswith(line_end):
                    raise HttpError(400, "chunk longer than its size")
                if len(line_end) < 2:
                    break
                start += 2
                self._framing_bytes -= 2
                self._expects = "size line"
            end = buffer.find(b"\n", start) + 1
            line_bytes = (end or len(buffer)) - start
            if line_bytes > min(self._framing_bytes, self._limits.chunk_overhead_bytes):
                if self._expects == "trailer line":
                    raise HttpError(431, "trailer section too long")
                raise HttpError(413, "too much chunk framing for too little content")
            if not end:
                break
            self._framing_bytes -= line_bytes
            if self._expects == "size line":
                self._read_size_line(bytes(buffer[start:end]))
            else:
                self._read_trailer_line(bytes(buffer[start:end]))
            start = end
        return start

    def _read_size_line(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise HttpError(400, "malformed chunk size line")
        self._chunk_bytes = int(match[1], 16)
        data_bytes = len(self.data)
        if data_bytes + self._chunk_bytes > self._limits.body_bytes:
            raise HttpError(413, f"content longer than {self._limits.body_bytes} bytes")
        if self._chunk_bytes:
            allowed = (data_bytes + self._chunk_bytes) // _DATA_PER_FRAMING_BYTE - data_bytes // _DATA_PER_FRAMING_BYTE
            self._framing_bytes += allowed
            self._expects = "data"
        else:
            self._framing_bytes = min(self._framing_bytes, self._limits.chunk_overhead_bytes)
            self._expects = "trailer line"

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
    a request without keep-alive (RFC 9112 section 9.6), all further bytes are dropped.
    """

    def __init__(self, limits: Limits) -> None:
        self.head: Head | None = None  # of the request whose content is not complete yet
        self.idle = True  # nothing has arrived after the requests returned
        self._limits = limits
        self._request_line_bytes = min(limits.target_bytes + _METHOD_AND_VERSION_BYTES, limits.head_bytes - 2)
        self._quick_head_bytes = min(_CACHED_HEAD_BYTES, self._request_line_bytes)
        self._buffer: bytes | bytearray = b""  # one piece as received, or a bytearray of several
        self._start = 0  # the buffer before it is consumed
        self._searched_bytes = 0  # from _start on, in which no head ends
        self._chunked: _ChunkedContent | None = None
        self._ended = False
        self._dropped = False
        self._error: HttpError | None = None

    @property
    def buffered_bytes(self) -> int:
        """The number of bytes stored for requests not returned yet."""
        return len(self._buffer) - self._start + (len(self._chunked.data) if self._chunked else 0)

    def receive_data(self, data: bytes) -> None:
        """Store bytes from the socket."""
        if data:
            self.idle = False
        if not self._buffer:
            if self._ended:
                self._dropped |= bool(data)
            else:
                self._buffer = data
            return
        self._release()
        buffer = self._buffer
        if isinstance(buffer, bytes):
            self._buffer = buffer = bytearray(buffer)
        buffer += data

    def next_request(self) -> Request | None:
        """Return the next complete request, or None if that takes more data.

        Raise HttpError 400, 413, 414, 417, 431, 501 or 505, and again at each later call: the connection must close.
        """
        buffer = self._buffer
        if not buffer:
            if self._error is not None:
                raise self._error
            return None
        try:
            if type(buffer) is bytes and not self._start and self.head is None:
                # The fast path, for one whole request in one piece. The general code below does the same.
                end = buffer.find(b"\r\n\r\n") + 4
                if 4 < end <= self._quick_head_bytes and buffer[0] > 13:
                    whole = _parse_head_cached(buffer[:end], self._limits)
                    if end + whole.content_length == len(buffer) and whole.keep_alive and not whole.chunked:
                        self._buffer = b""
                        self.idle = True
                        return Request(whole, buffer[end:])
            request = self._next_request()
        except HttpError as error:
            self._error = error
            self._end()
            self.idle = self.head is None and not self._dropped
            raise
        self.idle = not self._buffer and self.head is None and not self._dropped
        return request

    def _next_request(self) -> Request | None:
        head = self.head or self._next_head()
        if head is None:
            self._release()
            return None
        body = self._chunked_body() if head.chunked else self._take(head.content_length)
        if body is None:
            self.head = head
            self._release()
            return None
        self.head = None
        if not head.keep_alive:
            self._end()
        return Request(head, body)

    def _next_head(self) -> Head | None:
        if self._buffer[self._start] in b"\r\n":
            self._skip_empty_lines()
        buffer, start, searched_bytes = self._buffer, self._start, self._searched_bytes
        end = buffer.find(b"\r\n\r\n", start + searched_bytes - 3 if searched_bytes > 3 else start) + 4
        if end < 4:
            self._refuse_early(len(buffer))
            self._searched_bytes = len(buffer) - start
            return None
        head_bytes = end - start
        if head_bytes > self._request_line_bytes:
            self._refuse_early(end)
        raw = bytes(buffer[start:end])
        if head_bytes <= _CACHED_HEAD_BYTES:
            head = _parse_head_cached(raw, self._limits)
        else:
            head = parse_head(raw, self._limits)
        self._searched_bytes = 0
        self._start = end
        if head.chunked:
            self._chunked = _ChunkedContent(self._limits)
        return head

    def _skip_empty_lines(self) -> None:
        if skipped := _EMPTY_LINES.match(self._buffer, self._start):
            self._advance(skipped.end())
        if self._buffer.startswith(b"\n", self._start):  # a CR before it may have belonged to the content
            raise HttpError(400, "bare line feed before a request")

    def _refuse_early(self, stop: int) -> None:
        """Refuse a head, complete or not, that is too long or has an invalid byte before `stop`.

        Of several faults the first in the stream counts, so the pieces it comes in make no difference.
        """
        start, limits = self._start, self._limits
        bad = _NOT_IN_HEAD.search(self._buffer, start + max(0, self._searched_bytes - 1), stop)
        reach_bytes = (bad.end() - 1 if bad else stop) - start
        line_stop = start + self._request_line_bytes + 2
        if start + reach_bytes >= line_stop and self._buffer.find(b"\r\n", start, line_stop) < 0:
            raise HttpError(414, f"request target longer than {limits.target_bytes} bytes")
        if reach_bytes > limits.head_bytes:
            raise HttpError(431, f"request head longer than {limits.head_bytes} bytes")
        if bad:
            raise HttpError(400, "control character or bare line feed in the request head")

    def _take(self, size: int) -> bytes | None:
        buffer, start = self._buffer, self._start
        end = start + size
        if end > len(buffer):
            return None
        # A single copy, also for a bytearray.
        data = buffer[start:end] if isinstance(buffer, bytes) else bytes(memoryview(buffer)[start:end])
        self._advance(end)
        return data

    def _chunked_body(self) -> bytes | None:
        assert self._chunked is not None
        self._advance(self._chunked.receive(self._buffer, self._start))
        if not self._chunked.complete:
            return None
        body = bytes(self._chunked.data)
        self._chunked = None
        return body

    def _advance(self, start: int) -> None:
        if start == len(self._buffer):
            self._buffer = b""
            start = 0
        self._start = start

    def _release(self) -> None:
        """Free what is consumed, so that a small rest does not keep a large piece alive."""
        if self._start:
            if isinstance(self._buffer, bytearray):
                del self._buffer[: self._start]
            else:
                self._buffer = self._buffer[self._start :]
            self._start = 0

    def _end(self) -> None:
        self._ended = True
        self._dropped = bool(self._buffer)
        self._chunked = None
        self._buffer = b""
        self._start = 0
