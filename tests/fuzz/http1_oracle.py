"""What the HTTP/1.1 parser must keep for every stream of bytes, and what h11 and httptools make of the same bytes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import h11
import httptools

from common.errors import HttpError
from common.http.parser import Head, Limits, Request, RequestParser

CORPUS = Path(__file__).parent / "corpus"
LIMITS = Limits(target_bytes=200, head_bytes=1000, headers=20, body_bytes=500, chunk_overhead_bytes=100)
STATUSES = {400, 413, 414, 417, 431, 501, 505}


class Outcome(NamedTuple):
    """What a parser says about a stream: the requests in it, and the status of the error after them."""

    requests: tuple[tuple[Head, bytes], ...]
    status: int | None  # None: it waits for more
    idle: bool


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(CORPUS.glob("*.http"))]


def read(
    pieces: Iterable[bytes], limits: Limits = LIMITS, on_request: Callable[[Request], None] | None = None
) -> Outcome:
    """Feed a stream piece by piece. Fail when the parser stores more than its limits allow."""
    parser = RequestParser(limits)
    requests: list[tuple[Head, bytes]] = []
    status: int | None = None
    ended = False  # by a request that is the last, or by an error
    for piece in pieces:
        if ended:
            break
        parser.receive_data(piece)
        try:
            while not ended and (request := parser.next_request()) is not None:
                requests.append((request.head, request.body))
                if on_request is not None:
                    on_request(request)
                ended = not request.head.keep_alive
        except HttpError as error:
            status = error.status
            ended = True
        assert ended or parser.buffered_bytes <= limits.head_bytes + limits.body_bytes + limits.chunk_overhead_bytes
    return Outcome(tuple(requests), status, not ended and parser.idle)


def single_bytes(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


_TO_ASCII = bytes(min(byte, 0x7E) for byte in range(256))


def _ascii_line(raw: bytes) -> bytes:
    line, end, rest = raw.partition(b"\r\n")
    return line.translate(_TO_ASCII) + end + rest


# Where we accept what h11 refuses: the reason, and the same request as h11 accepts it.
LENIENCIES: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    (
        "RFC 9112 section 2.2 skips empty lines before a request line",
        lambda raw: raw.lstrip(b"\r\n"),
    ),
    (
        "RFC 9112 section 7.1.1 accepts white space before the ; of a chunk extension",
        lambda raw: re.sub(rb"(\r\n[0-9A-Fa-f]{1,16})[ \t]+;", rb"\1;", raw),
    ),
    (
        "a query has any form, since it is ignored",
        _ascii_line,
    ),
)


class Seen(NamedTuple):
    """What every parser must agree on."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def read_h11(raw: bytes) -> Seen | None:
    """Return the one request that `raw` is, to its last byte; None if h11 refuses it."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(raw)
    head: h11.Request | None = None
    body = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                assert connection.trailing_data == (b"", False), "h11 sees an earlier end of the request"
                return Seen(bytes(head.method), bytes(head.target), tuple(head.headers), body)
            else:
                raise AssertionError("h11 sees no end of the request")
    except h11.RemoteProtocolError:
        return None


class _Callbacks:
    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.messages = 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.messages += 1


def read_httptools(raw: bytes) -> Seen | None:
    """Do as `read_h11`, without headers. httptools also refuses methods that it does not know."""
    callbacks = _Callbacks()
    parser = httptools.HttpRequestParser(callbacks)
    try:
        parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    assert callbacks.messages == 1, "httptools sees another end of the request"
    return Seen(parser.get_method(), callbacks.url, (), callbacks.body)


def check(stream: bytes, cuts: Iterable[int] = ()) -> Counter[str]:
    """Check all that must hold for any stream. Return what was seen, for statistics; raise AssertionError."""
    counts: Counter[str] = Counter(streams=1)
    whole = read([stream])
    assert whole.status is None or whole.status in STATUSES

    ends: list[int] = []
    requests: list[Request] = []
    offset = 0

    def pieces() -> Iterable[bytes]:
        nonlocal offset
        for piece in single_bytes(stream):
            offset += 1
            yield piece

    def on_request(request: Request) -> None:
        ends.append(offset)
        requests.append(request)

    assert read(pieces(), on_request=on_request) == whole, "the result depends on the pieces"
    bounds = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    assert read(stream[a:b] for a, b in itertools.pairwise(bounds)) == whole, "the result depends on the pieces"

    start = 0
    for request, end in zip(requests, ends, strict=True):
        _compare(stream[start:end], request, counts)
        start = end
    if whole.status is None:
        counts["streams without error"] += 1
    else:
        counts[f"refused with {whole.status}"] += 1
        rest = h11.Connection(h11.SERVER)
        rest.receive_data(stream[start:])
        try:
            accepted = isinstance(rest.next_event(), h11.Request)
        except h11.RemoteProtocolError:
            accepted = False
        counts["of these, heads that h11 accepts"] += accepted
    return counts


def _compare(raw: bytes, request: Request, counts: Counter[str]) -> None:
    head = request.head
    ours = Seen(head.method, head.target.translate(_TO_ASCII), head.headers, request.body)
    counts["requests accepted"] += 1
    theirs = read_h11(raw)
    for reason, rewrite in LENIENCIES:
        if theirs is not None:
            break
        rewritten = rewrite(raw)
        if rewritten != raw:
            raw = rewritten
            theirs = read_h11(raw)
            counts[f"h11 is stricter: {reason}"] += 1
    assert theirs is not None, f"h11 refuses {raw!r}"
    # h11 itself puts the value of Transfer-Encoding into lower case.
    headers = tuple((name, value.lower() if name == b"transfer-encoding" else value) for name, value in ours.headers)
    assert theirs == ours._replace(headers=headers)

    also = read_httptools(raw)
    if also is not None:
        counts["requests that httptools accepts too"] += 1
        assert also == ours._replace(headers=())
