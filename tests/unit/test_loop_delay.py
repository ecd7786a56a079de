"""No client's bytes keep the event loop from the others for long; hypothesis searches for those that do."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import HealthCheck, example, given, settings, target
from hypothesis import strategies as st

from tests.fuzz.loop_delay import MOST_SECONDS, delay_of
from tests.support.least import least

EVENT = json.dumps(
    {
        "device_id": "d",
        "client_id": 7,
        "created_at": "now",
        "data": {"license_id": "l", "preds": [{"image_frame": "a", "prob": "0.5", "tags": ["x"]}]},
    }
).encode()
MOST_BODY_BYTES = 8 * 2**20 - 1
PRED = b'{"image_frame":"a","prob":"0.5","tags":["x"]}'
LONG_PRED = b'{"image_frame":"%b","prob":"0.%b","tags":["%b"]}' % ("é".encode() * 10, b"1" * 700, "é".encode())


def around_preds(device_id: bytes) -> tuple[bytes, bytes]:
    """Return what is before the predictions of an event, and what is after them."""
    head = b'{"device_id":%b,"client_id":"c","created_at":"t","data":{"license_id":"l","preds":[' % device_id
    return head, b"]}}"


def around_frame(device_id: bytes) -> tuple[bytes, bytes]:
    """Return what is before the text of a frame, and what is after it."""
    before, after = around_preds(device_id)
    return before + b'{"image_frame":"', b'","prob":1,"tags":[]}' + after


# What a body repeats, and what is before and after it.
PARTS = [b"[", b"{}", b"1", b'""', b" ", b"1e400", b'"\\ud800"', b'{"a":[{}]}', b'{"data":{"preds":[{},{},{}]}}', EVENT]
PARTS += [
    PRED,
    LONG_PRED,
    PRED[:-1],
    b"A",
    b"\\n",
    b"\\u20ac",
    b"\\ud800",
    b'\\"',
    b"\\\\",
    "é".encode(),
    "😀".encode(),
    b"0.1",
]
FRAMES = [(b"", b""), (b"[", b"]"), (b'{"data":{"preds":[', b"]}}"), (b'{"device_id":"', b'"}'), (b" ", EVENT)]
FRAMES += [make(device_id) for make in (around_preds, around_frame) for device_id in (b'"d"', b"9" * 30, b"null")]
SEPARATORS = [b"", b",", b"\n"]
FIELDS = {
    "": b"",
    "gzip": b"Content-Encoding: gzip\r\n",
    "lines": b"Content-Type: application/x-ndjson\r\n",
}


def body_of(part: bytes, separator: bytes, frame: tuple[bytes, bytes], size: int) -> bytes:
    room = size - len(frame[0]) - len(frame[1]) - len(part)
    return frame[0] + (part + separator) * max(0, room // len(part + separator)) + part + frame[1]


def request(path: bytes, body: bytes, kind: str, chunk_bytes: int) -> bytes:
    if kind == "gzip":
        body = gzip.compress(body, 6, mtime=0)
    head = b"POST %b HTTP/1.1\r\nHost: h\r\n%b" % (path, FIELDS[kind])
    if not chunk_bytes:
        return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
    pieces = (body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"%bTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (head, chunks)


def measured(streams: list[bytes]) -> float:
    """Return how long the streams delay the others."""
    return least(lambda: delay_of(streams).seconds, MOST_SECONDS)


@pytest.mark.fuzz
@settings(max_examples=4 if settings().max_examples < 1000 else 1000, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([b"/process", b"/process/batch"]),
    part=st.sampled_from(PARTS),
    separator=st.sampled_from(SEPARATORS),
    frame=st.sampled_from(FRAMES),
    size=st.sampled_from([100, 10_000, 16_384, 100_000, 1_000_000, MOST_BODY_BYTES]),
    kind=st.sampled_from(list(FIELDS)),
    chunk_bytes=st.sampled_from([0, 0, 48, 1000]),
    pipelined=st.sampled_from([1, 4, 32]),
    clients=st.sampled_from([1, 8]),
)
@example(b"/process/batch", PARTS[8], b",", FRAMES[1], 300_000, "gzip", 0, 32, 1)
@example(b"/process", b" ", b"", FRAMES[4], 7_900_000, "", 48, 1, 1)
@example(b"/process", b"{}", b",", FRAMES[2], 15_000, "", 0, 32, 4)
@example(b"/process", LONG_PRED, b",", around_preds(b"9" * 30), MOST_BODY_BYTES, "", 0, 1, 1)
@example(b"/process", b"\\n", b"", around_frame(b"9" * 30), 4_100_000, "gzip", 0, 1, 2)
@example(b"/process/batch", b'\\"', b",", around_frame(b"null"), MOST_BODY_BYTES, "lines", 0, 1, 1)
def test_no_bytes_delay_the_others(
    path: bytes,
    part: bytes,
    separator: bytes,
    frame: tuple[bytes, bytes],
    size: int,
    kind: str,
    chunk_bytes: int,
    pipelined: int,
    clients: int,
) -> None:
    stream = request(path, body_of(part, separator, frame, size), kind, chunk_bytes)
    most = max(1, 4_000_000 // len(stream))  # in all, so that an example takes a second at most
    seconds = measured([stream * min(pipelined, most)] * min(clients, most))
    target(seconds)
    assert seconds < MOST_SECONDS


@pytest.mark.parametrize("path", [b"/healthz", b"/metrics", b"/openapi.json", b"/docs", b"/nowhere"])
def test_pipelined_pages_delay_nobody(path: bytes) -> None:
    """There are as many as are read at once, on each of several connections."""
    get = b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % path
    assert measured([get * (100_000 // len(get))] * 4) < MOST_SECONDS


def test_a_body_in_tiny_chunks_is_refused_soon() -> None:
    """Each byte of data would buy a byte of framing, and some microseconds of work."""
    streams = [request(b"/process", b"[" + b"1," * 3_900_000 + b"1]", "", 6)]
    assert delay_of(streams).answers.startswith(b"HTTP/1.1 413 ")
    assert measured(streams) < MOST_SECONDS
