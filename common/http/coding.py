"""Content codings: bounded decoding of gzip and deflate. Pure: bytes in, bytes out."""

from __future__ import annotations

import zlib

from common.errors import HttpError

# Content codings by name (RFC 9110 section 8.4.1), with zlib's wbits. "deflate" is the zlib format (RFC 1950).
_WBITS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_ACCEPTED = "gzip, deflate"


def content_coding(content_encoding: bytes | None) -> bytes | None:
    """Return the one content coding that a Content-Encoding value names, in lower case; None if it names none.

    Devices send an empty value, and `identity`, alone or in a list. Raise HttpError 415 for an unknown coding and for
    several, with Accept-Encoding (RFC 9110 section 12.5.3).
    """
    if content_encoding is None:
        return None
    names = [name for each in content_encoding.lower().split(b",") if (name := each.strip()) not in (b"", b"identity")]
    if len(names) > 1 or not _WBITS.keys() >= set(names):
        raise HttpError(415, "the content codings supported are gzip and deflate", (("Accept-Encoding", _ACCEPTED),))
    return names[0] if names else None


def decoded(content_encoding: bytes | None, body: bytes, max_bytes: int) -> bytes:
    """Return the content of `body`, of which no more than `max_bytes` + 1 bytes are inflated.

    The body is one gzip member, or one zlib stream, and nothing after it. Raise HttpError 400, 413 or 415.
    """
    coding = content_coding(content_encoding)
    if coding is None:
        return body
    name = coding.decode()
    inflater = zlib.decompressobj(wbits=_WBITS[coding])
    try:
        data = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise HttpError(400, f"invalid {name} content (deflate is the zlib format, RFC 1950)") from error
    if len(data) > max_bytes:
        raise HttpError(413, f"content longer than {max_bytes} bytes when inflated")
    if not inflater.eof or inflater.unused_data:
        raise HttpError(400, f"{name} content is cut off, or goes on after its end (one member is taken)")
    return data
