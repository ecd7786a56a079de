"""The hot frames of AMQP 0-9-1: publish and ack out; deliver, confirm and return in. Pure: bytes in, values out.

Everything else on the wire is cold: it passes through unchanged, for aiormq. Section numbers are those of the AMQP
0-9-1 specification; what RabbitMQ adds (confirms, nack, blocked) is in its extension pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

HOT_CHANNEL = 1
JSON, NDJSON = b"application/json", b"application/x-ndjson"  # content types: one event, or one event a line
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_METHOD, _HEADER, _BODY = 1, 2, 3
_END = b"\xce"
_FRAME = Struct(">BHI")  # type, channel, payload size (2.3.5)
_CONTENT = Struct(">BHIHHQ")  # a content header frame: type, channel, size, class, weight, body size
_U64 = Struct(">Q")
_ACK = Struct(">BHIHHQBB")
_OVERHEAD = 8  # 7 bytes before a frame's payload, 1 after
# RabbitMQ does not split a header frame above frame_max, and it adds to what a publisher sent within that limit. No
# header comes near this bound: RabbitMQ 4 takes no body that is larger, by default.
_MOST_HEADER_BYTES = 16 * 1024 * 1024
_TLS_ALERT = 0x15  # what a TLS port answers to a protocol header (RFC 8446, 5.1)

# A piece of what is written. A large body is written in place: only the kernel copies it.
Part = bytes | memoryview

_DELIVER, _RETURN = b"\x00\x3c\x00\x3c", b"\x00\x3c\x00\x32"
_CONFIRM_ACK, _CONFIRM_NACK = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x78"
_CANCEL, _CHANNEL_CLOSE = b"\x00\x3c\x00\x1e", b"\x00\x14\x00\x28"
_CONNECTION_CLOSE, _BLOCKED, _UNBLOCKED = b"\x00\x0a\x00\x32", b"\x00\x0a\x00\x3c", b"\x00\x0a\x00\x3d"


class FrameError(Exception):
    """A byte stream that is not AMQP: a frame too large, without its end octet, or with inconsistent content."""


class Delivery(NamedTuple):
    """A message from the broker. `header` is the payload of its content header frame."""

    delivery_tag: int
    redelivered: bool
    header: bytes
    body: bytes


_tuple: Any = tuple.__new__  # a NamedTuple's own constructor takes three times as long


class Confirm(NamedTuple):
    """A publisher confirm: an ack (`ok`) or a nack. `multiple` covers every lower delivery tag too."""

    delivery_tag: int
    multiple: bool
    ok: bool


class Notice(NamedTuple):
    """A frame that concerns the fast lane: "lost" with the reason; "blocked" with the reason, or "" at its end."""

    kind: str
    text: str


class _Content:
    """A message that has arrived in part: first its method, then its header, then its body."""

    __slots__ = ("deliver", "header", "missing_bytes", "pieces")

    def __init__(self, deliver: tuple[int, bool] | None) -> None:
        self.deliver = deliver  # its delivery tag and `redelivered`; None if it was returned
        self.header = b""
        self.missing_bytes = 0  # of the body, once the header is here
        self.pieces: list[bytes] = []


class FrameDecoder:
    """A decoder that separates the hot frames of `HOT_CHANNEL` from a byte stream that may be split anywhere.

    `feed` returns the cold bytes, whole frames only, in their order. It appends hot frames to `deliveries`, `confirms`
    and `notices`, which the caller empties.
    """

    __slots__ = ("_content", "_rest", "_started", "confirms", "deliveries", "frame_max", "notices")

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.confirms: list[Confirm] = []
        self.notices: list[Notice] = []
        self.frame_max = 0  # bytes of a whole frame; 0: not yet negotiated, or no limit
        self._rest = b""
        self._started = False
        self._content: _Content | None = None  # the message in flight on the hot channel, unless it came at once

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the socket; return the cold ones. Raise FrameError."""
        if self._rest:
            data = self._rest + data
        if not self._started and data:
            if data[0] > HEARTBEAT[0]:  # the highest type of a frame; a broker that wants another version sends AMQP
                what = "TLS; write amqps:// in AMQP_URL" if data[0] == _TLS_ALERT else "another protocol"
                raise FrameError(f"it speaks {what}")
            self._started = True
        cold: list[bytes] = []
        size_of_data, position, cold_from = len(data), 0, 0
        while size_of_data - position >= _OVERHEAD:
            kind, channel, size = _FRAME.unpack_from(data, position)
            end = position + size + _OVERHEAD
            if end > size_of_data:
                most = _MOST_HEADER_BYTES if kind == _HEADER and channel == HOT_CHANNEL else self.frame_max
                if size + _OVERHEAD > most and self.frame_max:
                    raise FrameError(f"a frame of {size + _OVERHEAD} bytes, but frame_max is {self.frame_max}")
                break
            if data[end - 1] != 0xCE:
                raise FrameError("a frame without its end octet")
            if channel == HOT_CHANNEL and (hot_end := self._hot(kind, data, position + 7, end)):
                if cold_from < position:
                    cold.append(data[cold_from:position])
                position = cold_from = hot_end
                continue
            if kind == _METHOD:
                self._notice(channel, data, position + 7)
            position = end
        if cold_from < position:
            cold.append(data[cold_from:position])
        self._rest = data[position:]
        return b"".join(cold)

    def _hot(self, kind: int, data: bytes, start: int, end: int) -> int:
        """Take a frame with its payload from `start` if it is hot. Return where the next one begins; 0 if it is cold.

        After a Deliver, the header and the only body frame are taken too if both are here.
        """
        content = self._content
        if kind != _METHOD:
            if content is None:
                return 0
            self._add(content, kind, data[start : end - 1])
            return end
        method = data[start : start + 4]
        if method == _DELIVER and content is None:
            at = start + 5 + data[start + 4]  # after the consumer tag
            deliver = _U64.unpack_from(data, at)[0], data[at + 8] & 1 == 1
            if message_end := self._whole_message(deliver, data, end):
                return message_end
            self._content = _Content(deliver)
        elif method in (_CONFIRM_ACK, _CONFIRM_NACK):
            (tag,) = _U64.unpack_from(data, start + 4)
            self.confirms.append(_tuple(Confirm, (tag, data[start + 12] & 1 == 1, method == _CONFIRM_ACK)))
        elif method != _DELIVER and method != _RETURN:
            return 0
        elif content is not None:
            raise FrameError("a method frame inside a message")
        else:
            self.notices.append(Notice("lost", f"returned: {_short_string(data, start + 6)}"))
            self._content = _Content(None)
        return end

    def _whole_message(self, deliver: tuple[int, bool], data: bytes, start: int) -> int:
        """Take the header and the only body frame from `start` if both are here. Return their end; 0 otherwise."""
        size_of_data = len(data)
        if size_of_data - start < _CONTENT.size:
            return 0
        kind, channel, size, _, _, body_size = _CONTENT.unpack_from(data, start)
        body_frame = start + size + _OVERHEAD
        end: int = body_frame + body_size + _OVERHEAD
        if (
            end > size_of_data
            or kind != _HEADER
            or channel != HOT_CHANNEL
            or _FRAME.unpack_from(data, body_frame) != (_BODY, HOT_CHANNEL, body_size)
            or data[body_frame - 1] != 0xCE
            or data[end - 1] != 0xCE
        ):
            return 0
        header, body = data[start + 7 : body_frame - 1], data[body_frame + 7 : end - 1]
        self.deliveries.append(_tuple(Delivery, (*deliver, header, body)))
        return end

    def _add(self, content: _Content, kind: int, payload: bytes) -> None:
        """Add a header or body frame to the message in flight."""
        if kind == _HEADER and not content.header:
            (content.missing_bytes,) = _U64.unpack_from(payload, 4)
            content.header = payload
        elif kind == _BODY and content.missing_bytes:
            content.pieces.append(payload)
            content.missing_bytes -= len(payload)
            if content.missing_bytes < 0:
                raise FrameError("a message longer than its header says")
        else:
            raise FrameError(f"an unexpected frame of type {kind} inside a message")
        if not content.missing_bytes:  # also after the header of an empty body
            self._content = None
            if content.deliver is not None:
                body = content.pieces[0] if len(content.pieces) == 1 else b"".join(content.pieces)
                self.deliveries.append(Delivery(*content.deliver, content.header, body))

    def _notice(self, channel: int, data: bytes, start: int) -> None:
        method = data[start : start + 4]
        if channel == 0 and method == _BLOCKED:
            self.notices.append(Notice("blocked", _short_string(data, start + 4) or "no reason given"))
        elif channel == 0 and method == _UNBLOCKED:
            self.notices.append(Notice("blocked", ""))
        elif (channel == 0 and method == _CONNECTION_CLOSE) or (channel == HOT_CHANNEL and method == _CHANNEL_CLOSE):
            self.notices.append(Notice("lost", f"closed: {_short_string(data, start + 6)}"))
        elif channel == HOT_CHANNEL and method == _CANCEL:
            self.notices.append(Notice("lost", "the broker cancelled the consumer"))


def _short_string(data: bytes, at: int) -> str:
    return data[at + 1 : at + 1 + data[at]].decode("utf-8", "replace")


def _body_frames(body: bytes, body_max: int) -> list[Part]:
    parts: list[Part] = []
    view = memoryview(body)
    for start in range(0, len(body), body_max):
        piece = view[start : start + body_max]
        parts += (_FRAME.pack(_BODY, HOT_CHANNEL, len(piece)), piece, _END)
    return parts


class PublishEncoder:
    """An encoder of persistent messages of one content type to one queue."""

    __slots__ = ("_before_size", "_body_frame", "_body_max", "_head", "_properties")

    def __init__(self, queue_name: str, frame_max: int, content_type: bytes = JSON) -> None:
        """Prepare what all messages share. `frame_max` is the negotiated one, in bytes; 0 is no limit."""
        # Property flags: content-type, delivery-mode, message-id, timestamp. The message-id has 32 bytes.
        before_id = b"\x90\xc0" + bytes([len(content_type)]) + content_type + b"\x02\x20"
        header_size = 2 + 2 + 8 + len(before_id) + 32 + 8
        header_frame = _FRAME.pack(_HEADER, HOT_CHANNEL, header_size) + b"\x00\x3c\x00\x00"
        key = queue_name.encode()  # after class, method and the name of the default exchange; before `mandatory`
        publish = b"\x00\x3c\x00\x28\x00\x00\x00" + bytes([len(key)]) + key + b"\x01"
        self._before_size = _FRAME.pack(_METHOD, HOT_CHANNEL, len(publish)) + publish + _END + header_frame
        self._properties = before_id
        self._body_frame = _END + bytes([_BODY]) + HOT_CHANNEL.to_bytes(2, "big")
        # All up to the body of a message, with body size, message_id, timestamp, and the size of its only body frame.
        self._head = Struct(f">{len(self._before_size)}sQ{len(before_id)}s32s8s{len(self._body_frame)}sI").pack
        self._body_max = frame_max - _OVERHEAD if frame_max else 2**31 - 1  # of the body in one frame (4.2.3)

    def encode(self, body: bytes, message_id: bytes, timestamp: bytes) -> Sequence[Part]:
        """Return the frames of one message, in parts. `message_id` has 32 bytes, `timestamp` 8 bytes."""
        size = len(body)
        if 0 < size <= self._body_max:
            head = self._head(self._before_size, size, self._properties, message_id, timestamp, self._body_frame, size)
            return head, body, _END
        header = (self._before_size, _U64.pack(size), self._properties, message_id, timestamp, _END)
        return [b"".join(header), *_body_frames(body, self._body_max)]


def packed_seconds(seconds: int) -> bytes:
    """Return a timestamp property: Unix time in seconds, 64 bits (4.2.5.4)."""
    return _U64.pack(seconds)


def ack_frame(delivery_tag: int, multiple: bool) -> bytes:
    """Return a Basic.Ack frame."""
    return _ACK.pack(_METHOD, HOT_CHANNEL, 13, 60, 80, delivery_tag, multiple, 0xCE)
