"""Streams that misled other servers, as reported to their projects, run against the whole API.

The numbers are of advisories, issues and changes of these projects. Advisories about HTTP/2, HTTP/3, WebSocket frames,
forms, static files, clients, FastCGI, JWT and certificates do not apply: predlog has none of these. What only
shows when a stream comes in pieces is in test_http_parser, where every input is also cut at every byte.
Each stream is followed by a good request, which must not be answered when it is unclear where the first one ends.
"""

from __future__ import annotations

import gzip
import re

import pytest

from tests.fuzz.loop_delay import MOST_SECONDS, delay_of

EVENT = b'{"device_id":"d","client_id":"c","created_at":"t","data":{"license_id":"l","preds":[%b]}}'
HUGE_EXPONENT = EVENT % b'{"image_frame":"f","prob":1e99999999999999999999,"tags":[]}'
GOOD = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
BOMB = gzip.compress(bytes(50_000_000))


def post(*fields: bytes, body: bytes = b"") -> bytes:
    return b"POST /process HTTP/1.1\r\nHost: h\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def get(target: bytes, *fields: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: h\r\n" % target + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


REFUSED: dict[str, tuple[bytes, int]] = {
    "vertical tab before chunked": (
        post(b"Content-Length: 5", b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"),
        400,
    ),
    "empty field name: HAProxy CVE-2023-25725, gunicorn 3104": (post(b": x", b"Content-Length: 2", body=b"{}"), 400),
    "empty Content-Length: HAProxy CVE-2023-40225": (post(b"Content-Length:", b"Content-Length: 2", body=b"{}"), 400),
    "underscore in Content-Length: aiohttp CVE-2023-47627": (post(b"Content-Length: 0_2", body=b"{}"), 400),
    "plus in Content-Length: aiohttp CVE-2023-47627": (post(b"Content-Length: +2", body=b"{}"), 400),
    "digits that are not ASCII: aiohttp CVE-2025-69225": (post("Content-Length: ٢".encode(), body=b"{}"), 400),
    "Content-Length as a list: gunicorn 2026": (post(b"Content-Length: 2, 2", body=b"{}"), 400),
    "Content-Length and chunked: aiohttp CVE-2023-47641": (
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        400,
    ),
    "Kelvin sign in chunked: aiohttp CVE-2025-69224": (
        post("Transfer-Encoding: chun\u212aed".encode(), body=b"0\r\n\r\n"),
        400,
    ),
    "chunked twice": (post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 400),
    "chunked is not last: gunicorn CVE-2024-1135": (
        post(b"Transfer-Encoding: chunked,gzip", b"Content-Length: 2", body=b"{}"),
        400,
    ),
    "conflicting codings: gunicorn CVE-2024-1135": (
        post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Content-Length: 2", body=b"{}"),
        400,
    ),
    "unknown coding, and a length: gunicorn CVE-2024-6827": (
        post(b"Transfer-Encoding: xchunked", b"Content-Length: 2", body=b"{}"),
        400,
    ),
    "comma before chunked: gunicorn 3087": (post(b"Transfer-Encoding: ,chunked", body=b"0\r\n\r\n"), 501),
    "chunked in HTTP/1.0": (
        b"POST /process HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "huge chunk size: nginx CVE-2013-2028": (chunked(b"ffffffffffffffed\r\nx"), 413),
    "chunk size in Python's notation: gunicorn 3047": (chunked(b"0x2_e\r\n{}"), 400),
    "no chunk size: hyper": (chunked(b"\r\n\r\n"), 400),
    "line feed in a chunk extension: aiohttp CVE-2024-52304": (chunked(b"2;a\nb\r\n{}\r\n0\r\n\r\n"), 400),
    "line feed ends a chunk: HAProxy 7b737da": (chunked(b"2\r\n{}\n0\r\n\r\n"), 400),
    "chunk without its end: h11 CVE-2025-43859": (chunked(b"2\r\n{}XX0\r\n\r\n"), 400),
    "chunks of one byte: aiohttp CVE-2025-69229": (chunked(b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n"), 413),
    "Content-Length in trailers: aiohttp CVE-2025-53643": (chunked(b"2\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n"), 400),
    "endless trailers: aiohttp CVE-2026-22815": (chunked(b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 100_000), 431),
    "two Hosts: aiohttp CVE-2026-34525": (get(b"/healthz", b"Host: i"), 400),
    "no Host: Envoy CVE-2026-47220": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two names in Host: HAProxy changelog": (b"GET /healthz HTTP/1.1\r\nHost: a,b\r\n\r\n", 400),
    "path in Host: Starlette 1.0.1": (b"GET /healthz HTTP/1.1\r\nHost: a/docs?x=\r\n\r\n", 400),
    "NUL in a value: HAProxy 0d76a28, aiohttp CVE-2026-34520": (get(b"/healthz", b"a: b\0c"), 400),
    "line feed in a value: gunicorn 3144": (get(b"/healthz", b"a: x\n\r\0"), 400),
    "carriage return ends the head: llhttp": (b"GET /healthz HTTP/1.1\r\nHost: h\r\n\rZ" + GOOD, 400),
    "folded line": (get(b"/healthz", b"a: b", b" Content-Length: 9"), 400),
    "space before the colon: aiohttp CVE-2024-23829": (post(b"Content-Length : 2", body=b"{}"), 400),
    "odd version: aiohttp CVE-2024-23829": (b"GET /healthz HTTP/1.1_0\r\nHost: h\r\n\r\n", 400),
    "fragment in a target: HAProxy CVE-2023-45539": (get(b"/healthz#.png"), 400),
    "asterisk without OPTIONS: gunicorn 2026": (get(b"*"), 400),
    "relative target: gunicorn 2026": (get(b"healthz"), 400),
    "very long target": (get(b"/" + b"a" * 70_000), 414),
    "very many fields": (get(b"/", *[b"a:"] * 5000), 431),
    "data after CONNECT: Envoy CVE-2025-64763, hypercorn 277": (b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "refused before its body came": (b"POST /nowhere HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n", 404),
    "after a close": (get(b"/healthz", b"Connection: close"), 200),
}


def run(stream: bytes) -> tuple[list[int], bytes]:
    """Return the statuses and the answers for a stream with a good request after it."""
    delay = delay_of([stream + GOOD])
    assert delay.seconds < MOST_SECONDS
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", delay.answers)], delay.answers


@pytest.mark.parametrize(("stream", "status"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_answered_after_what_misled_other_servers(stream: bytes, status: int) -> None:
    statuses, answers = run(stream)
    assert statuses == [status]
    assert b"Connection: close" in answers


UNDERSTOOD: dict[str, tuple[bytes, int]] = {
    "very long field name: HAProxy CVE-2021-40346": (
        post(b"Content-Length0" + b"a" * 270 + b": 9", b"Content-Length: 2", body=b"{}"),
        422,
    ),
    "inflation bomb: aiohttp CVE-2025-69223": (
        post(b"Content-Encoding: gzip", b"Content-Length: %d" % len(BOMB), body=BOMB),
        413,
    ),
    "inflation bomb that nobody reads: aiohttp CVE-2026-54278": (
        b"POST /nowhere HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
        % (len(BOMB), BOMB),
        404,
    ),
    "huge exponent: HAProxy CVE-2025-11230": (
        post(b"Content-Length: %d" % len(HUGE_EXPONENT), body=HUGE_EXPONENT),
        422,
    ),
    "CRLF in a target: uvicorn CVE-2020-7695, gunicorn CVE-2018-1000164": (get(b"/%0d%0aSet-Cookie:a"), 404),
    "escape sequence in a target: uvicorn CVE-2020-7694": (get(b"/%1b%5b31mred"), 404),
    "broken cookies: aiohttp CVE-2025-69230": (get(b"/healthz", b"Cookie: " + b"\xff[=;" * 3000), 200),
    "upgrade to h2c": (
        get(b"/healthz", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"),
        200,
    ),
    "upgrade answered 200: Envoy CVE-2024-23326": (
        get(b"/healthz", b"Connection: Upgrade", b"Upgrade: websocket"),
        200,
    ),
    "protocol that is not ASCII: granian CVE-2026-42544": (
        get(b"/healthz", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Protocol: \xff"),
        200,
    ),
    "fields that only a proxy may set: Envoy CVE-2024-45806": (
        get(b"/healthz", b"X-Forwarded-For: 127.0.0.1", b"X-Envoy-Internal: true"),
        200,
    ),
}


@pytest.mark.parametrize(("stream", "status"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_what_is_clear_is_answered_and_so_is_the_next(
    stream: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the stream is in a header or in the log."""
    statuses, answers = run(stream)
    assert statuses == [status, 200]
    assert b"Set-Cookie" not in answers
    assert b"Upgrade" not in answers
    assert not caplog.records


def test_a_pipeline_without_end_holds_little() -> None:
    """In aiohttp (CVE-2026-54273), requests were queued without a limit."""
    statuses, _ = run(GOOD * 5000)
    assert statuses == [200] * 5001
