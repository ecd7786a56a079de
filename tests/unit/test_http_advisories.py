"""Streams that went wrong in other servers: what those were told of, run against the whole API.

Each stream is followed by a good request, which must not be answered when it is unclear where the first one ends.
"""

from __future__ import annotations

import gzip
import re

import pytest

from tests.fuzz.loop_delay import delay_of

GOOD = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
BOMB = gzip.compress(bytes(50_000_000))


def post(*fields: bytes, body: bytes = b"") -> bytes:
    return b"POST /process HTTP/1.1\r\nHost: h\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def get(target: bytes, *fields: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: h\r\n" % target + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


@pytest.mark.parametrize(
    ("stream", "statuses"),
    [
        (post(b"Content-Length: 5", b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), [400]),
        (post(b"Content-Length0" + b"a" * 270 + b": 9", b"Content-Length: 2", body=b"{}"), [422, 200]),
        (post(b": x", b"Content-Length: 2", body=b"{}"), [400]),
        (post(b"Content-Length:", body=b"{}"), [400]),
        (post(b"Content-Length: 0_2", body=b"{}"), [400]),
        (chunked(b"ffffffffffffffed\r\nx"), [413]),
        (chunked(b"2;a\nb\r\n{}\r\n0\r\n\r\n"), [400]),
        (chunked(b"2\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n"), [400]),
        (chunked(b"2\r\n{}XX0\r\n\r\n"), [400]),
        (post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), [400]),
        (post(b"Transfer-Encoding: chunked,gzip", b"Content-Length: 2", body=b"{}"), [400]),
        (get(b"/%0d%0aSet-Cookie:a"), [404, 200]),
        (get(b"/" + b"a" * 70_000), [414]),
        (get(b"/", *[b"a:"] * 5000), [431]),
        (chunked(b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n"), [413]),
        (post(b"Content-Encoding: gzip", b"Content-Length: %d" % len(BOMB), body=BOMB), [413, 200]),
        (get(b"/healthz", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"), [200, 200]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    ],
    ids=[
        "vertical tab before chunked",
        "very long field name",
        "empty field name",
        "empty Content-Length",
        "underscore in Content-Length",
        "huge chunk size",
        "line feed in a chunk extension",
        "Content-Length in trailers",
        "chunk without its end",
        "chunked twice",
        "chunked is not last",
        "CRLF in a target",
        "very long target",
        "very many fields",
        "chunks of one byte",
        "inflation bomb",
        "upgrade to h2c",
        "preface of HTTP/2",
    ],
)
def test_what_misled_other_servers(stream: bytes, statuses: list[int]) -> None:
    answers = delay_of([stream + GOOD]).answers
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)] == statuses
    assert b"Set-Cookie" not in answers
