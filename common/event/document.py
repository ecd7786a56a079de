"""JSON documents of bounded cost, and the exact reading of what orjson cannot represent. Pure."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import orjson

from common.errors import InvalidEvent
from common.event.faults import make_fault

# The bound on the values of a document, counted as commas and opening brackets and braces. A prediction with `n` tags
# has 4 + n of them, so `max_preds` predictions may have 8 tags each.
VALUES_PER_PRED = 12
SPARE_VALUES = 10_000
# The exact reading of a refused document is many times slower than orjson's where numbers are long, strings many, or
# characters escaped. It is not tried on a document with more bytes outside strings, strings, or backslashes.
EXACT_READING_BYTES = 1 << 18
EXACT_READING_STRINGS = 1 << 17
EXACT_READING_ESCAPES = 1 << 21

_VALUE_CHARS = (b",", b"[", b"{")
_WINDOW_BYTES = 1 << 16
_STEP_BYTES = 1 << 18
_RARE_HITS = 16  # at most, in a window
_BOM = b"\xef\xbb\xbf"

T = TypeVar("T")
# Work that yields every few milliseconds, so that its caller can do other work in between, and returns its result.
Steps = Generator[None, None, T]


def finish(steps: Steps[T]) -> T:
    """Do all the steps at once, and return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


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


def read_exactly(body: bytes, otherwise: object) -> Steps[object]:
    """Read `body` with the standard library, which keeps long integers, NaN and lone surrogates.

    Return `otherwise` where that would cost too much. Raise InvalidEvent with the position of what is not JSON.
    """
    if len(body) > EXACT_READING_BYTES:
        if body.count(b"\\") > EXACT_READING_ESCAPES:
            return otherwise
        outside_bytes = strings = 0
        for outside in _outside_strings(body):
            yield
            outside_bytes += len(outside)
            strings += outside.count(b'"')
            if outside_bytes > EXACT_READING_BYTES or strings > EXACT_READING_STRINGS:
                return otherwise
    try:
        text = body.decode("utf-8-sig")
        yield
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise unreadable(error.pos) from None
    except UnicodeDecodeError as error:
        raise unreadable(error.start) from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deep document
        return otherwise


def bound_values(body: bytes, lines: bool, limit: int) -> Steps[None]:
    """Raise InvalidEvent when a document has more than `limit` values, at a fraction of the cost of parsing.

    With `lines`, `body` is NDJSON: `limit` is for all its documents together.
    """
    if len(body) <= limit:
        return
    count = 0
    for start in range(0, len(body), _STEP_BYTES):
        count += _count_values(body[start : start + _STEP_BYTES], limit - count)
        if count > limit:
            break
        yield
    else:
        return
    count = strings = 0
    for document in body.split(b"\n") if lines else [body]:  # a quote that is not closed misleads in its own line only
        for outside in _outside_strings(document):  # a frame may be the text of an array of pixels
            yield
            count += _count_values(outside, limit - count)
            strings += outside.count(b'"')
            if count > limit or strings > limit:
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


def _outside_strings(body: bytes) -> Iterator[bytes]:
    """Yield a JSON document without its strings, in pieces. A quote stands for each string; the last may be missing."""
    inside = 0
    carried = b""
    for start in range(0, len(body), _STEP_BYTES):
        text = (carried + body[start : start + _STEP_BYTES]).replace(rb"\\", b"")
        carried = b"\\" if text.endswith(b"\\") else b""  # it escapes what the next piece begins with
        parts = text.replace(rb"\"", b"").split(b'"')
        yield b'"'.join(parts[inside::2])
        inside ^= len(parts) % 2 ^ 1


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
