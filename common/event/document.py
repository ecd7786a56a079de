"""JSON documents of bounded cost. Pure."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import orjson

from common.errors import InvalidEvent
from common.event.faults import make_fault

# A document up to this size is parsed without a bound: that takes 20 ms at most, whatever is in it.
UNBOUNDED_BYTES = 192 * 1024
# Finding the strings of a document with more backslashes than this would take too long.
_MOST_BACKSLASHES = 1 << 19

_OTHER_CHARS = bytes(set(range(256)) - set(b",:[{"))
_BOM = b"\xef\xbb\xbf"

T = TypeVar("T")
# Work in stages of at most 30 ms. It yields between them, so that its caller can do other work, and returns its result.
Stages = Generator[None, None, T]


def finish(stages: Stages[T]) -> T:
    """Do all the stages at once, and return their result."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            result: T = end.value
            return result


def write_json(value: object) -> bytes:
    """Return `value` as compact JSON in UTF-8."""
    return orjson.dumps(value)


def read_json(body: bytes) -> Any:
    """Return the JSON document in `body`: UTF-8, a byte order mark allowed, the last of equal keys wins, depth to 1024.

    An integer beyond 64 bits becomes a float. Raise InvalidEvent with one fault for an empty body, for what is not JSON
    (RFC 8259), which NaN is not, and for lone surrogates and numbers beyond a double, which RFC 8259 leaves open.
    """
    try:
        return orjson.loads(body.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        if not body:
            raise InvalidEvent([make_fault(("body",), "missing")]) from None
        raise InvalidEvent([make_fault(("body", error.pos), "json_invalid")]) from None


def bound_values(body: bytes, limit: int) -> Stages[None]:
    """Raise InvalidEvent when a large document has more than `limit` values and names, before it is parsed.

    They are counted as commas, colons, and opening brackets and braces outside strings. Up to the first byte that is
    not JSON, where parsing would end, this tells strings from the rest as a parser does.
    """
    if len(body) <= UNBOUNDED_BYTES or _count_values(body) <= limit:
        return
    yield
    if body.count(b"\\") <= _MOST_BACKSLASHES:  # an image_frame can be the text of an array of pixels
        unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
        yield
        if unescaped.count(b'"') <= 2 * limit and _count_values(b"".join(unescaped.split(b'"')[::2])) <= limit:
            return
    raise InvalidEvent(
        [make_fault(["body"], "json_too_large", f"Body should hold at most {limit} JSON values and names")]
    )


def _count_values(text: bytes) -> int:
    return len(text.translate(None, _OTHER_CHARS))
