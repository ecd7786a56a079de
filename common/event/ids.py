"""Message ids: their derivation from an idempotency key, and their digest for deduplication. Pure."""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b

from common.errors import InvalidEvent
from common.event.document import read_json


def keyed_message_id(key: bytes, normalised: bytes) -> bytes:
    """Return the AMQP message id of an event sent with an idempotency key: 32 hex digits, a 128-bit digest of both.

    The same key with another event gives another id.
    """
    head = len(key).to_bytes(4, "big") + key
    return blake2b(head + normalised, digest_size=16, person=b"predlog-msg-id").hexdigest().encode()


def id_digest(message_id: str | bytes) -> bytes:
    """Return the 16 bytes that the journal keeps of a message id: its own if it is 32 hex digits, else a digest."""
    text = message_id.encode(errors="surrogateescape") if isinstance(message_id, str) else message_id
    if len(text) == 32:
        with suppress(ValueError):
            own = bytes.fromhex(text.decode())
            if own.hex().encode() == text:  # fromhex skips white space and takes capitals
                return own
    return blake2b(text, digest_size=16, person=b"predlog-digest").digest()


_FIRST_MEMBER = b'{"message_id":"'


def line_id(line: bytes) -> bytes | None:
    """Return the id of an event that is a line of an NDJSON message: its member `message_id`, a string.

    Our producer writes it first, as 32 hex digits. Return None if the line has no such member, an empty one, or is not
    JSON.
    """
    if line.startswith(_FIRST_MEMBER) and line[47:49] == b'",' and line[15:47].isalnum():
        return line[15:47]
    if b"message_id" not in line:
        return None
    with suppress(InvalidEvent):
        document = read_json(line)
        found = document.get("message_id") if isinstance(document, dict) else None
        return found.encode() if isinstance(found, str) and found else None
    return None
