"""How an event is identified and routed: its message id, its line in a message of several, its partition. Pure."""

from __future__ import annotations

from hashlib import blake2b
from zlib import crc32

from common.errors import InvalidEvent
from common.event.document import read_json

_ID_CHARS = 32
LINE_START, ID_END = b'{"message_id":"', b'",'  # around the id in a line of a message of several events
_ID_STOP = len(LINE_START) + _ID_CHARS
_HEX_DIGITS = b"0123456789abcdef"


def keyed_message_id(key: bytes, normalised: bytes) -> bytes:
    """Return the AMQP message id of an event sent with an idempotency key: 32 hex digits, a 128-bit digest of both.

    The same key with another event gives another id.
    """
    head = len(key).to_bytes(4, "big") + key
    return blake2b(head + normalised, digest_size=16, person=b"predlog-msg-id").hexdigest().encode()


def id_digest(message_id: str | bytes) -> bytes:
    """Return the 16 bytes that the journal keeps of a message id: its own if it is 32 hex digits, else a digest."""
    text = message_id.encode(errors="surrogateescape") if isinstance(message_id, str) else message_id
    if len(text) == _ID_CHARS and not text.translate(None, _HEX_DIGITS):
        return bytes.fromhex(text.decode())
    return blake2b(text, digest_size=16, person=b"predlog-digest").digest()


def line_id(line: bytes) -> bytes | None:
    """Return the id of an event that is a line of a message; None if it has none, or if the line is not a JSON object.

    Other publishers can write the member `message_id` anywhere. A value that is not a string, or is empty, is no id.
    """
    if line.startswith(LINE_START) and line.startswith(ID_END, _ID_STOP):
        own = line[len(LINE_START) : _ID_STOP]
        if not own.translate(None, _HEX_DIGITS):
            return own
    try:
        document = read_json(line)
    except InvalidEvent:
        return None
    found = document.get("message_id") if type(document) is dict else None
    return found.encode() or None if type(found) is str else None


def partition_of(device_id: str, partitions: int) -> int:
    """Return zlib's unsigned crc32 of the UTF-8 bytes of a `device_id` in normal form, modulo `partitions`.

    Other publishers must use it too: it keeps a device's rows in one file, where a retry meets the first attempt's ids.
    """
    return crc32(device_id.encode()) % partitions
