"""Content codings: bounded decoding of gzip and deflate. Pure: bytes in, bytes out."""

from __future__ import annotations

import zlib
from collections.abc import Generator

from common.errors import HttpError

# Content codings by name (RFC 9110 section 8.4.1), with zlib's wbits. "deflate" is the zlib format (RFC 1950).
_WBITS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_ACCEPTED = "gzip, deflate"
_MEMBERS = 1000  # at most; log shippers and bgzip write several, and each costs an inflater
_INPUT_BYTES, _OUTPUT_BYTES = 1 << 16, 1 << 20  # of one step

Steps = Generator[None, None, bytes]


def require_known_coding(content_encoding: bytes) -> None:
    """Raise HttpError 415 for an unknown content coding, with Accept-Encoding (RFC 9110 section 12.5.3)."""
    name = content_encoding.lower()
    if name not in _WBITS and name != b"identity":
        raise HttpError(415, "the content codings supported are gzip and deflate", (("Accept-Encoding", _ACCEPTED),))


def decoded(content_encoding: bytes | None, body: bytes, max_bytes: int) -> Steps:
    """Decode `body` in steps of a few milliseconds; return the content. Raise HttpError 400, 413 or 415.

    There may be several members, and nothing after the last (RFC 1952 section 2.2). No more than `max_bytes` + 1 bytes
    are inflated.
    """
    if content_encoding is None or content_encoding.lower() == b"identity":
        return body
    require_known_coding(content_encoding)
    name = content_encoding.lower()
    data = bytearray()
    view = memoryview(body)
    start = 0
    for _ in range(_MEMBERS):
        inflater = zlib.decompressobj(wbits=_WBITS[name])
        while not inflater.eof:
            piece = inflater.unconsumed_tail or view[start : start + _INPUT_BYTES]
            if not piece:
                raise HttpError(400, f"{name.decode()} content is cut off")
            fresh = not inflater.unconsumed_tail
            try:
                data += inflater.decompress(piece, min(_OUTPUT_BYTES, max_bytes + 1 - len(data)))
            except zlib.error as error:
                form = " (it must be the zlib format, RFC 1950)" if name == b"deflate" else ""
                raise HttpError(400, f"invalid {name.decode()} content{form}") from error
            if len(data) > max_bytes:
                raise HttpError(413, f"content longer than {max_bytes} bytes when inflated")
            if fresh:
                start += len(piece)
            yield
        start -= len(inflater.unused_data)
        if start == len(body):
            return bytes(data)
    raise HttpError(400, f"more than {_MEMBERS} {name.decode()} members")
