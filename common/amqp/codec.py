"""The hot frames of AMQP 0-9-1: publish and ack out; deliver, confirm and return in. Pure: bytes in, values out.

Everything else on the wire is cold: it passes through unread, for aiormq. Section numbers are those of the AMQP 0-9-1
specification; what RabbitMQ adds (confirms, nack, blocked) is in its extension pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Any, NamedTuple

HOT_CHANNEL = 1
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_METHOD, _HEADER, _BODY = 1, 2, 3
_END = b"\xce"
_FRAME = Struct(">BHI")  # type, channel, payload size (2.3.5)
_CONTENT = Struct(
    ">BHIHHQ"
)  # a content header frame up to its body size: type, channel, size, class, weight, body size
_U64 = Struct(">Q")
_ACK = Struct(">BHIHHQBB")
_OVERHEAD = 8  # 7 bytes before a frame's payload, 1 after

# Of what is written. A large body is written from where it is: only the kernel copies it.
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
    """A cold frame that concerns the fast lane too: "blocked", "unblocked", "closed", "cancelled" or "returned"."""

    kind: str
    text: str


class FrameDecoder:
    """A decoder that separates the hot frames of `HOT_CHANNEL` from a byte stream that may be split anywhere.

    `feed` returns the cold bytes, whole frames only, in their order. It appends hot frames to `deliveries`, `confirms`
    and `notices`, which the caller empties.
    """

    __slots__ = (
        "_deliver",
        "_header",
        "_parts",
        "_rest",
        "_started",
        "_wanted",
        "confirms",
        "deliveries",
        "frame_max",
        "notices",
    )

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.confirms: list[Confirm] = []
        self.notices: list[Notice] = []
        self.frame_max = 0  # bytes of a whole frame; 0: not yet negotiated, or no limit
        self._rest: bytes | bytearray = b""
        self._started = False
        # A message in flight on the hot channel: its Deliver (None if returned), its header, its body so far.
        self._deliver: tuple[int, bool] | None = None
        self._header: bytes | None = None
        self._parts: list[bytes] = []
        self._wanted = -1  # body bytes still to come; -1: no content in flight, -2: its header comes next

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the socket; return the cold ones. Raise FrameError."""
        if self._rest:
            data = bytes(self._rest) + data
        if not self._started:
            if data[:1] == b"A":  # the broker's protocol header, to say that it wants another version (2.2.4)
                return data
            self._started = True
        cold: list[bytes] = []
        size_of_data, position, cold_from = len(data), 0, 0
        while size_of_data - position >= _OVERHEAD:
            kind, channel, size = _FRAME.unpack_from(data, position)
            end = position + size + _OVERHEAD
            if end > size_of_data:
                if self.frame_max and size + _OVERHEAD > self.frame_max:
                    raise FrameError(f"a frame of {size + _OVERHEAD} bytes, but frame_max is {self.frame_max}")
                break
            if data[end - 1] != 0xCE:
                raise FrameError("a frame without its end octet")
            if channel == HOT_CHANNEL and self._hot(kind, data, position + 7, end - 1):
                if cold_from < position:
                    cold.append(data[cold_from:position])
                if self._wanted == -2 and self._deliver is not None:
                    end = self._whole_message(data, end, size_of_data)
                cold_from = end
            elif kind == _METHOD:
                self._notice(channel, data, position + 7, end - 1)
            position = end
        if cold_from < position:
            cold.append(data[cold_from:position])
        self._rest = data[position:]
        return b"".join(cold)

    def _whole_message(self, data: bytes, start: int, stop: int) -> int:
        """Take the header and the only body frame behind a Deliver, if both are here. Return where to continue."""
        if stop - start < _CONTENT.size:
            return start
        kind, channel, size, _, _, body_size = _CONTENT.unpack_from(data, start)
        body_frame = start + size + _OVERHEAD
        end: int = body_frame + body_size + _OVERHEAD
        if end > stop or kind != _HEADER or channel != HOT_CHANNEL or not body_size:
            return start  # then frame by frame
        if (
            _FRAME.unpack_from(data, body_frame) != (_BODY, HOT_CHANNEL, body_size)
            or data[body_frame - 1] != 0xCE
            or data[end - 1] != 0xCE
        ):
            return start
        tag, redelivered = self._deliver or (0, False)
        header = data[start + 7 : body_frame - 1]
        self.deliveries.append(_tuple(Delivery, (tag, redelivered, header, data[body_frame + 7 : end - 1])))
        self._wanted = -1
        return end

    def _hot(self, kind: int, data: bytes, start: int, stop: int) -> bool:
        """Take the frame with the payload data[start:stop] if it is hot. Tell whether it was."""
        if kind == _METHOD:
            method = data[start : start + 4]
            if method in (_CONFIRM_ACK, _CONFIRM_NACK):
                (tag,) = _U64.unpack_from(data, start + 4)
                self.confirms.append(_tuple(Confirm, (tag, data[start + 12] & 1 == 1, method == _CONFIRM_ACK)))
                return True
            if method != _DELIVER and method != _RETURN:
                return False
            if self._wanted != -1:
                raise FrameError("a method frame inside a message")
            if method == _DELIVER:
                at = start + 5 + data[start + 4]  # behind the consumer tag
                self._deliver = (_U64.unpack_from(data, at)[0], data[at + 8] & 1 == 1)
            else:
                self._deliver = None
                self.notices.append(Notice("returned", _short_string(data, start + 6)))
            self._wanted = -2
            return True
        if self._wanted == -1:
            return False
        payload = data[start:stop]
        if kind == _HEADER and self._wanted == -2:
            (self._wanted,) = _U64.unpack_from(payload, 4)
            self._header = payload
        elif kind == _BODY and self._wanted > 0:
            self._parts.append(payload)
            self._wanted -= len(payload)
            if self._wanted < 0:
                raise FrameError("a message longer than its header says")
        else:
            raise FrameError(f"an unexpected frame of type {kind} inside a message")
        if self._wanted == 0:  # also behind the header of an empty body
            if self._deliver is not None:
                body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self.deliveries.append(Delivery(*self._deliver, self._header or b"", body))
            self._parts = []
            self._wanted = -1
        return True

    def _notice(self, channel: int, data: bytes, start: int, stop: int) -> None:
        method = data[start : start + 4]
        if channel == 0 and method == _BLOCKED:
            self.notices.append(Notice("blocked", _short_string(data, start + 4)))
        elif channel == 0 and method == _UNBLOCKED:
            self.notices.append(Notice("unblocked", ""))
        elif (channel == 0 and method == _CONNECTION_CLOSE) or (channel == HOT_CHANNEL and method == _CHANNEL_CLOSE):
            self.notices.append(Notice("closed", _short_string(data, start + 6)))
        elif channel == HOT_CHANNEL and method == _CANCEL:
            self.notices.append(Notice("cancelled", "the broker cancelled the consumer"))


def _short_string(data: bytes, at: int) -> str:
    return data[at + 1 : at + 1 + data[at]].decode("utf-8", "replace")


def _publish_method(queue_name: str) -> bytes:
    """Return a Basic.Publish frame to the default exchange, mandatory."""
    key = queue_name.encode()
    publish = b"\x00\x3c\x00\x28\x00\x00\x00" + bytes([len(key)]) + key + b"\x01"
    return _FRAME.pack(_METHOD, HOT_CHANNEL, len(publish)) + publish + _END


def _body_max(frame_max: int) -> int:
    """Return how many bytes of a body fit in one frame (4.2.3). A `frame_max` of 0 is no limit."""
    return frame_max - _OVERHEAD if frame_max else 2**31 - 1


def _body_frames(body: bytes, body_max: int) -> list[Part]:
    parts: list[Part] = []
    view = memoryview(body)
    for start in range(0, len(body), body_max):
        piece = view[start : start + body_max]
        parts += (_FRAME.pack(_BODY, HOT_CHANNEL, len(piece)), piece, _END)
    return parts


def publish_frames(queue_name: str, header: bytes, body: bytes, frame_max: int) -> list[Part]:
    """Return the frames of one message, in parts. `header` is the payload of its content header frame."""
    parts: list[Part] = [_publish_method(queue_name), _FRAME.pack(_HEADER, HOT_CHANNEL, len(header)), header, _END]
    return parts + _body_frames(body, _body_max(frame_max))


class PublishEncoder:
    """The fast form of `publish_frames`, for persistent messages of one content type to one queue."""

    __slots__ = ("_before_size", "_body_frame", "_body_max", "_head", "_properties")

    def __init__(self, queue_name: str, frame_max: int, content_type: bytes = b"application/json") -> None:
        """Prepare what all messages share. `frame_max` is the negotiated one, in bytes; 0 is no limit."""
        # Property flags: content-type, delivery-mode, message-id, timestamp. The message-id has 32 bytes.
        before_id = b"\x90\xc0" + bytes([len(content_type)]) + content_type + b"\x02\x20"
        header_size = 2 + 2 + 8 + len(before_id) + 32 + 8
        header_frame = _FRAME.pack(_HEADER, HOT_CHANNEL, header_size) + b"\x00\x3c\x00\x00"
        self._before_size = _publish_method(queue_name) + header_frame
        self._properties = before_id
        self._body_frame = _END + bytes([_BODY]) + HOT_CHANNEL.to_bytes(2, "big")
        # All up to the body of a message: with body size, message_id, timestamp, and the size of its only body frame.
        self._head = Struct(f">{len(self._before_size)}sQ{len(before_id)}s32s8s{len(self._body_frame)}sI").pack
        self._body_max = _body_max(frame_max)

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


def ack_frames(tags: Iterable[tuple[int, bool]]) -> bytes:
    """Return Basic.Ack frames for (delivery_tag, multiple) pairs."""
    return b"".join([ack_frame(tag, multiple) for tag, multiple in tags])
