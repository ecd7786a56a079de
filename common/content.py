"""What a header says about the content of a request: media type, coding, idempotency key. Pure: bytes in, bytes out."""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

from common.errors import HttpError

JSON = b"application/json"
NDJSON = b"application/x-ndjson"

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_PARAMETER = rb'(%b)=(?:(%b)|"((?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*)")' % (_TOKEN, _TOKEN)
_MEDIA_TYPE = re.compile(rb"(%b/%b)((?:[ \t]*+;[ \t]*+(?:%b)?)*)" % (_TOKEN, _TOKEN, _PARAMETER))
_PARAMETERS = re.compile(rb";[ \t]*+%b" % _PARAMETER)
_QUOTED_PAIR = re.compile(rb"\\(.)", re.DOTALL)

_KEY = re.compile(rb"[!-~]{1,255}")
_QUOTED_KEY = re.compile(rb'"((?:[!#-\[\]-~]|\\["\\])*)"')

_CODINGS = frozenset((b"gzip", b"x-gzip", b"identity"))
_GZIP_MEMBERS = 1000  # log shippers and bgzip write several; each costs an inflater
_GZIP_INPUT_BYTES = 65536


@lru_cache(64)
def media_type(content_type: bytes | None) -> bytes | None:
    """How a Content-Type value asks to be read (RFC 9110 section 8.3.1): as JSON, as NDJSON, or None: not at all.

    JSON is application/json, application/*+json, and no Content-Type. A charset parameter must be UTF-8.
    """
    if content_type is None:
        return JSON
    match = _MEDIA_TYPE.fullmatch(content_type)
    if match is None:
        return None
    for name, token, quoted in _PARAMETERS.findall(match[2]):
        charset = token or _QUOTED_PAIR.sub(rb"\1", quoted)
        if name.lower() == b"charset" and charset.lower() not in (b"utf-8", b"utf8"):
            return None
    essence = match[1].lower()
    if essence == NDJSON:
        return NDJSON
    if essence == JSON or (essence.startswith(b"application/") and essence.endswith(b"+json")):
        return JSON
    return None


def require_json(content_type: bytes | None, lines: bool = False) -> None:
    """Raises HttpError 415 for what is not JSON, nor (with `lines`) NDJSON."""
    accepted = (JSON, NDJSON) if lines else (JSON,)
    if media_type(content_type) not in accepted:
        names = b", ".join(accepted).decode()
        raise HttpError(415, f"content must be {names.replace(', ', ' or ')}, in UTF-8", (("Accept", names),))


def is_json_lines(content_type: bytes | None) -> bool:
    return media_type(content_type) == NDJSON


def require_known_coding(content_encoding: bytes | None) -> None:
    """Raises HttpError 415 for another content coding than gzip (RFC 9110 sections 8.4 and 12.5.3)."""
    if content_encoding is not None and content_encoding.lower() not in _CODINGS:
        raise HttpError(415, "the only content coding supported is gzip", (("Accept-Encoding", "gzip"),))


def decoded(content_encoding: bytes | None, body: bytes, max_bytes: int) -> bytes:
    """Content without its coding. Raises HttpError 400, 413 or 415."""
    require_known_coding(content_encoding)
    if content_encoding is None or content_encoding.lower() == b"identity":
        return body
    return inflate(body, max_bytes)


def inflate(body: bytes, max_bytes: int) -> bytes:
    """Gzip content without its coding (RFC 1952): one member or several, nothing after them.

    Never inflates more than `max_bytes` + 1. Raises HttpError 413 above `max_bytes`, 400 when the content is not gzip.
    """
    data = bytearray()
    view = memoryview(body)
    start = 0
    for _ in range(_GZIP_MEMBERS):
        start = _inflate_member(view, start, data, max_bytes)
        if start == len(body):
            return bytes(data)
    raise HttpError(400, f"more than {_GZIP_MEMBERS} gzip members")


def _inflate_member(body: memoryview, start: int, data: bytearray, max_bytes: int) -> int:
    """Append one member to `data`; returns where it ended. In slices, for zlib copies what it does not consume."""
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    while not inflater.eof:
        piece = body[start : start + _GZIP_INPUT_BYTES]
        if not piece:
            raise HttpError(400, "gzip content is cut off")
        try:
            data += inflater.decompress(piece, max_bytes + 1 - len(data))
        except zlib.error as error:
            raise HttpError(400, "content is not valid gzip") from error
        if len(data) > max_bytes:
            raise HttpError(413, f"content longer than {max_bytes} bytes when inflated")
        start += len(piece) - len(inflater.unused_data)
    return start


def idempotency_key(value: bytes | None) -> bytes | None:
    """The key of an Idempotency-Key value: 1 to 255 visible ASCII characters.

    Bare, or as a string of RFC 8941 section 3.3.3: both are the same key. Raises HttpError 400.
    """
    if value is None:
        return None
    key = value
    if quoted := _QUOTED_KEY.fullmatch(value):
        key = _QUOTED_PAIR.sub(rb"\1", quoted[1])
    if not _KEY.fullmatch(key) or (quoted is None and value.startswith(b'"')):
        raise HttpError(400, "Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key
