"""Header fields about the content of a request: media type and idempotency key. Pure: bytes in, bytes out."""

from __future__ import annotations

import re
from functools import lru_cache

from common.errors import HttpError

JSON = b"application/json"
NDJSON = b"application/x-ndjson"
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii", b""})

# A bare key, as clients send it, or an sf-string (RFC 8941 section 3.3.3):
# DQUOTE *( unescaped / "\\" ( DQUOTE / "\\" ) ) DQUOTE
_KEY = re.compile(rb"[!-~]{1,255}")
_QUOTED_KEY = re.compile(rb'"((?:[!#-\[\]-~]|\\["\\])*)"')


@lru_cache(64)
def media_type(content_type: bytes | None) -> bytes | None:
    """Return JSON or NDJSON for a Content-Type value (RFC 9110 section 8.3.1), and None for any other type.

    JSON is application/json, application/*+json, and no Content-Type. A charset parameter must be UTF-8, a subset of
    it, or empty. Parameters are read leniently, since nothing else depends on them.
    """
    if content_type is None:
        return JSON
    essence, *parameters = content_type.lower().split(b";")
    for parameter in parameters:
        name, _, value = parameter.partition(b"=")
        if name.strip() == b"charset" and value.strip(b' \t"') not in _CHARSETS:
            return None
    essence = essence.strip()
    if essence == NDJSON:
        return NDJSON
    if essence == JSON or (essence.startswith(b"application/") and essence.endswith(b"+json")):
        return JSON
    return None


def idempotency_key(value: bytes | None) -> bytes | None:
    """Return the key of an Idempotency-Key value, 1 to 255 visible ASCII characters; None without the field.

    A bare key and the same key as a string (RFC 8941 section 3.3.3) are equal. Raise HttpError 400.
    """
    if value is None:
        return None
    quoted = _QUOTED_KEY.fullmatch(value)
    key = value if quoted is None else re.sub(rb"\\(.)", rb"\1", quoted[1])
    if not _KEY.fullmatch(key) or (quoted is None and value.startswith(b'"')):
        raise HttpError(400, "Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key
