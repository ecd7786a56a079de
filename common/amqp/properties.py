"""Message properties as they are on the wire, octet by octet (AMQP 0-9-1, 4.2.6). Pure: bytes in, values out."""

from __future__ import annotations

from common.amqp.codec import FrameError

# The properties before message-id, in the order of their flags from bit 15 down (4.2.6.1): each is a short string, but
# for headers (a table with a 4-byte length), delivery-mode and priority (an octet).
_BEFORE_MESSAGE_ID = (
    (0x8000, "s"),
    (0x4000, "s"),
    (0x2000, "t"),
    (0x1000, "o"),
    (0x0800, "o"),
    (0x0400, "s"),
    (0x0200, "s"),
    (0x0100, "s"),
)
_OURS = b"\x90\xc0\x10application/json\x02\x20"  # as PublishEncoder writes them, up to the length of the message-id


def message_id_of(header: bytes) -> bytes | None:
    """The message-id property from a content header's payload; None if the publisher set none. Raises FrameError."""
    if header[12:33] == _OURS:
        return header[33:65]
    try:
        flags = int.from_bytes(header[12:14], "big")
        if not flags & 0x0080:
            return None
        at = 14
        for flag, kind in _BEFORE_MESSAGE_ID:
            if flags & flag:
                at += (
                    1
                    if kind == "o"
                    else 1 + header[at]
                    if kind == "s"
                    else 4 + int.from_bytes(header[at : at + 4], "big")
                )
        return header[at + 1 : at + 1 + header[at]] or None  # an empty one names nothing
    except IndexError:
        raise FrameError("a content header that ends too early") from None
