"""Content codings: gzip content without its coding, within bounds. Pure: bytes in, bytes out."""

from __future__ import annotations

import zlib

from common.errors import HttpError

_CODINGS = frozenset((b"gzip", b"x-gzip", b"identity"))
_GZIP_MEMBERS = 1000  # log shippers and bgzip write several; each costs an inflater
_GZIP_INPUT_BYTES = 65536


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
