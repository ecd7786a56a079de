"""What was published on a channel, read back from the bytes that a lane was given."""

from __future__ import annotations

import json
import struct
from typing import NamedTuple

_FRAME = struct.Struct(">BHI")  # type, channel, payload size


class Published(NamedTuple):
    """One AMQP message."""

    content_type: str
    message_id: bytes
    body: bytes

    @property
    def event_ids(self) -> list[bytes]:
        """The ids of its events, in order."""
        if self.content_type == "application/json":
            return [self.message_id]
        return [json.loads(line)["message_id"].encode() for line in self.body.splitlines()]


def published(sent: bytes) -> list[Published]:
    """Return the messages in a stream of whole frames that only publishes."""
    messages: list[Published] = []
    header, body, wanted, at = b"", b"", 0, 0
    while at < len(sent):
        kind, _, size = _FRAME.unpack_from(sent, at)
        payload, at = sent[at + 7 : at + 7 + size], at + 8 + size
        assert sent[at - 1] == 0xCE
        if kind == 2:
            header, body, wanted = payload, b"", int.from_bytes(payload[4:12], "big")
        elif kind == 3:
            body += payload
        if kind != 1 and len(body) == wanted:
            id_at = 14 + 1 + header[14] + 1  # after flags, content-type and delivery-mode
            content_type = header[15 : 15 + header[14]].decode()
            messages.append(Published(content_type, header[id_at + 1 : id_at + 1 + header[id_at]], body))
    return messages
