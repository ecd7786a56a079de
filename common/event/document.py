"""JSON documents of bounded cost, and the exact reading of what orjson cannot represent. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from common.errors import InvalidEvent
from common.event.faults import make_fault

# The bound on the values of a document, counted as commas and opening brackets and braces. A prediction with `n` tags
# has 4 + n of them, so `max_preds` predictions may have 8 tags each.
VALUES_PER_PRED = 12
SPARE_VALUES = 10_000
# The exact reading of a refused document is many times slower than orjson's where numbers are long. It is not tried on
# documents with more bytes than this outside strings.
EXACT_READING_BYTES = 1 << 18

_VALUE_CHARS = (b",", b"[", b"{")
_WINDOW_BYTES = 1 << 16
_RARE_HITS = 16  # at most, in a window
_BOM = b"\xef\xbb\xbf"


def write_json(value: object) -> bytes:
    """Return `value` as compact JSON in UTF-8."""
    return orjson.dumps(value)


def read_json(body: bytes) -> Any:
    """Return the JSON document in `body`: UTF-8, a byte order mark allowed, the last of equal keys wins, depth to 1024.

    Integers beyond 64 bits become floats; `read_exactly` keeps them. Raise InvalidEvent with one fault for an empty
    body and for what RFC 8259 does not allow, including NaN, lone surrogates and numbers beyond a double.
    """
    try:
        return orjson.loads(body.removeprefix(_BOM))
    except orjson.JSONDecodeError as error:
        if not body:
            raise InvalidEvent([make_fault(("body",), "missing")]) from None
        raise unreadable(error.pos) from None


def unreadable(position: int) -> InvalidEvent:
    """Return the error of a document that stops being JSON at byte `position`."""
    return InvalidEvent([make_fault(("body", position), "json_invalid")])


# The shortest integer of more than 64 bits.
NINETEEN_DIGITS = b"0" * 19
DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")


def read_exactly(body: bytes, otherwise: object) -> object:
    """Read `body` with the standard library, which keeps long integers, NaN and lone surrogates.

    Return `otherwise` where that would cost too much. Raise InvalidEvent with the position of what is not JSON.
    """
    if len(body) > EXACT_READING_BYTES:
        outside = _outside_strings(body, EXACT_READING_BYTES)
        if outside is None or len(outside) > EXACT_READING_BYTES:
            return otherwise
    try:
        return json.loads(body.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise unreadable(error.pos) from None
    except UnicodeDecodeError as error:
        raise unreadable(error.start) from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep document
        return otherwise


def bound_values(bodies: Sequence[bytes], limit: int) -> None:
    """Raise InvalidEvent when documents have more than `limit` values in all, at a fraction of the cost of parsing."""
    if sum(map(len, bodies)) <= limit:
        return
    count = 0
    for body in bodies:
        count += _count_values(body, limit - count)
        if count > limit:
            break
    else:
        return
    count = 0
    for body in bodies:
        outside = _outside_strings(body, limit)  # a frame may be the text of an array of pixels
        count += limit + 1 if outside is None else _count_values(outside, limit - count)
        if count > limit:
            message = f"Body should hold at most {limit} JSON values"
            raise InvalidEvent([make_fault(["body"], "json_too_large", message)])


def _count_values(text: bytes, limit: int) -> int:
    """Count the values of a document; beyond `limit`, stop soon."""
    count = 0
    for start in range(0, len(text), _WINDOW_BYTES):
        for char in _VALUE_CHARS:
            count += _count_char(text, char, start, start + _WINDOW_BYTES)
        if count > limit:
            break
    return count


def _count_char(text: bytes, char: bytes, start: int, end: int) -> int:
    """Count `char` in text[start:end].

    Where hits are rare, as in images, `find` (memchr) is ten times faster than `count`, which looks at every byte.
    Where they are frequent, `count` is faster.
    """
    for hits in range(_RARE_HITS):
        start = text.find(char, start, end) + 1
        if not start:
            return hits
    return _RARE_HITS + text.count(char, start, end)


def _outside_strings(body: bytes, most_strings: int) -> bytes | None:
    """Return a JSON document without the contents of its strings; None if it has more than `most_strings`."""
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(body.split(b'"')[::2]) if body.count(b'"') <= 2 * most_strings else None


def array_items(body: bytes) -> list[Any]:
    """Return the items of a JSON array. Raise InvalidEvent for any other document.

    Unlike a single event, an array is read once: where orjson refuses one item, it refuses the array. NDJSON is read
    line by line.
    """
    items = read_json(body)
    if type(items) is not list:
        raise InvalidEvent([make_fault(["body"], "list_type")])
    return items


def line_items(body: bytes, limit: int) -> list[bytes]:
    """Return the lines of NDJSON that are not blank. Raise InvalidEvent above `limit` lines of any kind."""
    if body.count(b"\n") > limit:
        raise InvalidEvent([make_fault(["body"], "json_too_large", f"Body should hold at most {limit} lines")])
    return [line for line in body.split(b"\n") if line.strip()]
