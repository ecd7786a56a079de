"""Message ids: their derivation from an idempotency key, and their digest for deduplication. Pure."""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b


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
