"""common.http: media types, content codings and idempotency keys, as values that a client can send."""

from __future__ import annotations

import gzip
import time
import tracemalloc
import zlib
from collections.abc import Callable

import pytest

from common.errors import HttpError
from common.http.coding import decoded, is_gzipped
from common.http.fields import JSON, NDJSON, idempotency_key, media_type
from tests.support.least import least


def refusal(action: Callable[..., object], *args: object) -> HttpError:
    with pytest.raises(HttpError) as caught:
        action(*args)
    return caught.value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, JSON),
        (b"application/json", JSON),
        (b"Application/JSON", JSON),
        (b"application/cloudevents+json", JSON),
        (b"application/vnd.a.b+JSON;v=1", JSON),
        (b"application/json;charset=utf-8", JSON),
        (b'application/json ;\tCharset="UTF-8"', JSON),
        (b"application/json;", JSON),
        (b"application/json; ; charset=utf-8;", JSON),
        (b"application/x-ndjson", NDJSON),
        (b"application/x-ndjson; charset=utf-8", NDJSON),
        (b"application/json; charset=latin-1", None),
        (b"application/json; charset=utf-16", None),
        (b'application/json; charset=""', JSON),
        (b"application/json; charset=", JSON),
        (b"application/json;charset=US-ASCII; a=b", JSON),
        (b"application/json; charset==", None),
        (b"application/json; charset=utf-8; charset=latin-1", None),
        (b"application/json; charset = latin-1", None),
        (b"application/json charset=utf-8", None),
        (b"application/json, application/json", None),
        (b"application/jsonp", None),
        (b"application/json+xml", None),
        (b"text/json", None),
        (b"text/a+json", None),
        (b"application", None),
        (b"application/", None),
        (b"/json", None),
        (b"", None),
        (b"*/*", None),
        (b"application/x-www-form-urlencoded", None),
        (b"text/plain;charset=utf-8", None),
    ],
)
def test_rfc_9110_section_8_3_media_type(value: bytes | None, expected: bytes | None) -> None:
    assert media_type(value) == expected


def test_a_hostile_media_type_is_read_in_linear_time() -> None:
    def seconds() -> float:
        began = time.process_time()
        for value in (
            b"a/b" + b" ;" * 8000 + b"\x00",
            b"a/b;" + b'a="\\\\' * 3000,
            b"a" * 16000,
            b"a/b" + b";a=b" * 4000 + b"=",
        ):
            assert media_type(value) is None
        return time.process_time() - began

    assert least(seconds, 0.1) < 0.1


@pytest.mark.parametrize("coding", [b"gzip", b"GZIP", b"x-gzip", b"identity, gzip", b"gzip ,identity", b"gzip,"])
def test_rfc_9110_section_8_4_gzip_is_decoded(coding: bytes) -> None:
    assert decoded(coding, gzip.compress(b"{}"), 2) == b"{}"


@pytest.mark.parametrize("coding", [None, b"identity", b"Identity, identity", b"", b" , "])
def test_content_without_a_coding_is_left_as_it_is(coding: bytes | None) -> None:
    assert decoded(coding, b"\x1f\x8b", 2) == b"\x1f\x8b"


@pytest.mark.parametrize("coding", [b"br", b"deflate", b"gzip, gzip", b"gzip, br", b"identity, br", b"gzip;q=1"])
def test_rfc_9110_section_12_5_3_415_names_the_codings(coding: bytes) -> None:
    for error in (refusal(is_gzipped, coding), refusal(decoded, coding, b"", 1)):
        assert (error.status, error.fields) == (415, b"Accept-Encoding: gzip\r\n")


def inflate(body: bytes, max_bytes: int) -> bytes:
    return decoded(b"gzip", body, max_bytes)


GOOD = gzip.compress(b'{"a": "bbbbbbbbbb"}', mtime=0)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_truncated_gzip_is_400(length: int) -> None:
    assert refusal(inflate, GOOD[:length], 100).status == 400


@pytest.mark.parametrize("rest", [b"\x00", b"garbage", b"\x00" * 100, GOOD[:3], GOOD])
def test_bytes_after_the_one_gzip_member_are_400(rest: bytes) -> None:
    assert refusal(inflate, GOOD + rest, 100).status == 400


@pytest.mark.parametrize("place", [0, 1, 2, len(GOOD) - 8, len(GOOD) - 1])
def test_damaged_gzip_is_400(place: int) -> None:
    assert refusal(inflate, GOOD[:place] + bytes([GOOD[place] ^ 1]) + GOOD[place + 1 :], 100).status == 400


@pytest.mark.parametrize("body", [b"{}", zlib.compress(b"{}"), b"\x00" * 20])
def test_what_is_not_gzip_is_400(body: bytes) -> None:
    assert refusal(inflate, body, 100).status == 400


def test_inflated_content_may_reach_the_limit_and_not_pass_it() -> None:
    body = gzip.compress(b"a" * 100)
    assert len(inflate(body, 100)) == 100
    assert refusal(inflate, body, 99).status == 413
    assert refusal(inflate, body, 1).status == 413


def test_a_bomb_is_413_and_never_inflated_past_the_limit() -> None:
    bomb = gzip.compress(bytes(100_000_000))
    tracemalloc.start()
    try:
        assert refusal(inflate, bomb, 1_000_000).status == 413
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (None, None),
        (b"k", b"k"),
        (b"8e03978e-40d5-43e8-bc93-6894a57f9324", b"8e03978e-40d5-43e8-bc93-6894a57f9324"),
        (b"!#~;=,\\", b"!#~;=,\\"),
        (b'a"b', b'a"b'),
        (b"a" * 255, b"a" * 255),
        (b'"k"', b"k"),
        (b'"a\\"b\\\\c"', b'a"b\\c'),
        (b'"' + b"\\\\" * 255 + b'"', b"\\" * 255),
    ],
)
def test_idempotency_key(value: bytes | None, key: bytes | None) -> None:
    assert idempotency_key(value) == key


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"a b",
        b"a\tb",
        b"\xc3\xa9",
        b"a\x7f",
        b"a" * 256,
        b'""',
        b'"',
        b'"a',
        b'"a"b"',
        b'"a b"',
        b'"a\\b"',
        b'"a\\"',
        b'"\xc3\xa9"',
        b'"a";b=c',
        b'"' + b"a" * 256 + b'"',
    ],
)
def test_rfc_8941_section_3_3_3_what_is_not_a_key_is_400(value: bytes | None) -> None:
    assert refusal(idempotency_key, value).status == 400
