"""The content coding gzip: bounded decoding. Pure: bytes in, bytes out."""

from __future__ import annotations

import zlib

from common.errors import HttpError


def is_gzipped(content_encoding: bytes | None) -> bool:
    """Return whether a Content-Encoding value (RFC 9110 section 8.4) names gzip.

    Devices send an empty value, and `identity`, alone or in a list. Raise HttpError 415 for any other coding and for
    several, with Accept-Encoding (RFC 9110 section 12.5.3).
    """
    if content_encoding is None:
        return False
    names = [name for each in content_encoding.lower().split(b",") if (name := each.strip()) not in (b"", b"identity")]
    if names and names not in ([b"gzip"], [b"x-gzip"]):
        raise HttpError(415, "the only content coding supported is gzip", (("Accept-Encoding", "gzip"),))
    return bool(names)


def decoded(content_encoding: bytes | None, body: bytes, max_bytes: int) -> bytes:
    """Return the content of `body`, of which no more than `max_bytes` + 1 bytes are inflated.

    A gzipped body is one member and nothing after it (RFC 1952). Raise HttpError 400, 413 or 415.
    """
    if not is_gzipped(content_encoding):
        return body
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        data = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise HttpError(400, "invalid gzip content") from error
    if len(data) > max_bytes:
        raise HttpError(413, f"content longer than {max_bytes} bytes when inflated")
    if not inflater.eof or inflater.unused_data:
        raise HttpError(400, "gzip content is cut off, or something follows it (only one member is accepted)")
    return data
