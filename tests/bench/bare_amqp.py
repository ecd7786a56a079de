"""AMQP over one blocking socket, with as little work per message as Python allows. It shows the broker's own limit, and
runs the harness's errands (declare, fill, count, purge). It shares only the queue's arguments with the project.
"""

from __future__ import annotations

import datetime
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from pamqp import body, commands, frame, header

from common.amqp.topology import QUEUE_ARGUMENTS

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
CHANNEL = 1
DELIVER, ACK, NACK, RETURN = 0x003C003C, 0x003C0050, 0x003C0078, 0x003C0032
METHOD = 1
BLOB_MESSAGES = 64  # messages in one send()

_frame_head = struct.Struct(">BHI")
_ack_frame = struct.Struct(">BHIIQBB")


class BareConnection:
    """One connection with one channel, without heartbeats. A context manager."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "localhost", parts.port or 5672), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._socket.sendall(PROTOCOL_HEADER)
        self._next_method()
        login = f"\0{unquote(parts.username or 'guest')}\0{unquote(parts.password or 'guest')}"
        tune = self._call(commands.Connection.StartOk({}, "PLAIN", login, "en_US"), channel=0)
        self.frame_max: int = tune.frame_max
        self._send(commands.Connection.TuneOk(tune.channel_max, tune.frame_max, 0), channel=0)
        vhost = unquote(parts.path[1:]) or "/"
        self._call(commands.Connection.Open(vhost), channel=0)
        self._call(commands.Channel.Open())

    def __enter__(self) -> BareConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def declare(self, queue: str) -> None:
        self._call(commands.Queue.Declare(queue=queue, durable=True, arguments=dict(QUEUE_ARGUMENTS)))

    def counts(self, queue: str) -> tuple[int, int]:
        """(ready messages, consumers) of a queue; (0, 0) if there is none."""
        answer = self._call(commands.Queue.Declare(queue=queue, passive=True))
        if isinstance(answer, commands.Channel.Close):
            self._send(commands.Channel.CloseOk())
            self._call(commands.Channel.Open())
            return 0, 0
        return answer.message_count, answer.consumer_count

    def purge(self, queue: str) -> None:
        self._call(commands.Queue.Purge(queue=queue))

    def delete(self, queue: str) -> None:
        self._call(commands.Queue.Delete(queue=queue))

    def detach(self) -> socket.socket:
        """Turn confirms on, and hand the socket over."""
        self._call(commands.Confirm.Select())
        return self._socket

    def publish(self, blobs: Iterable[bytes], count: int, window: int = 4096) -> None:
        """Send `count` messages in blobs of BLOB_MESSAGES (see `blobs`), with at most `window` unconfirmed."""
        self._call(commands.Confirm.Select())
        confirms, sent = Confirms(), 0
        for blob in blobs:
            while sent + BLOB_MESSAGES - confirms.count > window:
                self._receive_confirms(confirms)
            self._socket.sendall(blob)
            sent = min(sent + BLOB_MESSAGES, count)
        while confirms.count < count:
            self._receive_confirms(confirms)

    def consume(self, queue: str, count: int, prefetch: int = 2000, ack_every: int = 256) -> None:
        """Receive and ack `count` messages, looking only at the delivery tags."""
        self._call(commands.Basic.Qos(prefetch_count=prefetch))
        self._send(commands.Basic.Consume(queue=queue))
        received = acked = 0
        while received < count:
            for method, payload in self._methods():
                if method == DELIVER:
                    received += 1
                    if received - acked >= ack_every or received == count:
                        tag_at = 5 + payload[4]
                        acked = int.from_bytes(payload[tag_at : tag_at + 8], "big")
                        self._socket.sendall(_ack_frame.pack(METHOD, CHANNEL, 13, ACK, acked, 1, 0xCE))

    def _receive_confirms(self, confirms: Confirms) -> None:
        for method, payload in self._methods():
            if method == ACK:
                confirms.add(int.from_bytes(payload[4:12], "big"), bool(payload[12]))
            elif method in (NACK, RETURN):
                raise RuntimeError("the broker refused a message of the benchmark")

    def _methods(self) -> Iterator[tuple[int, bytes]]:
        """(class and method id, payload) of each method frame in the next piece of the stream."""
        piece = self._socket.recv(262_144)
        if not piece:
            raise ConnectionError("the broker closed the connection")
        data = self._buffer + piece
        at, size = 0, len(data)
        while at + 8 <= size:
            kind, _, length = _frame_head.unpack_from(data, at)
            if at + 8 + length > size:
                break
            if kind == METHOD:
                payload = data[at + 7 : at + 7 + length]
                yield int.from_bytes(payload[:4], "big"), payload
            at += 8 + length
        self._buffer = data[at:]

    def _send(self, method: Any, channel: int = CHANNEL) -> None:
        self._socket.sendall(frame.marshal(method, channel))

    def _call(self, method: Any, channel: int = CHANNEL) -> Any:
        self._send(method, channel)
        return self._next_method()

    def _next_method(self) -> Any:
        """The next method frame, decoded; whatever else arrives before it is skipped."""
        while True:
            if len(self._buffer) >= 7:
                end = 8 + int.from_bytes(self._buffer[3:7], "big")
                if len(self._buffer) >= end:
                    _, _, value = frame.unmarshal(self._buffer[:end])
                    self._buffer = self._buffer[end:]
                    if isinstance(value, commands.Connection.Close):
                        raise ConnectionError(value.reply_text)
                    if not isinstance(value, commands.Basic.Ack):
                        return value
                    continue
            piece = self._socket.recv(65_536)
            if not piece:
                raise ConnectionError("the broker closed the connection")
            self._buffer += piece


class Confirms:
    """Which delivery tags are confirmed: in any order, and `multiple` covers all lower ones."""

    def __init__(self) -> None:
        self._all_up_to = 0
        self._above: set[int] = set()

    @property
    def count(self) -> int:
        return self._all_up_to + len(self._above)

    def add(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._all_up_to = max(self._all_up_to, tag)
            self._above = {t for t in self._above if t > self._all_up_to}
        else:
            self._above.add(tag)
        while self._all_up_to + 1 in self._above:
            self._all_up_to += 1
            self._above.remove(self._all_up_to)


def messages(queue: str, bodies: Sequence[bytes], count: int, frame_max: int) -> Iterator[bytes]:
    """The frames of `count` persistent, mandatory messages that rotate over `bodies`, each with an id of its own."""
    halves = [_publish_template(queue, text, frame_max) for text in bodies]
    run = uuid4().hex[:16]
    for i, (before, after) in enumerate(islice(cycle(halves), count)):
        yield b"".join((before, f"{run}{i:016x}".encode(), after))


def blobs(queue: str, bodies: Sequence[bytes], count: int, frame_max: int) -> Iterator[bytes]:
    """The same, BLOB_MESSAGES at a time."""
    one_by_one = messages(queue, bodies, count, frame_max)
    while blob := b"".join(islice(one_by_one, BLOB_MESSAGES)):
        yield blob


def _publish_template(queue: str, text: bytes, frame_max: int) -> tuple[bytes, bytes]:
    """The frames of one message, before and after its message_id."""
    placeholder = "0123456789abcdef" * 2
    properties = commands.Basic.Properties(
        content_type="application/json",
        delivery_mode=2,
        message_id=placeholder,
        timestamp=datetime.datetime.now(datetime.UTC),
    )
    room = frame_max - 8
    frames = [
        frame.marshal(commands.Basic.Publish(routing_key=queue, mandatory=True), CHANNEL),
        frame.marshal(header.ContentHeader(0, len(text), properties), CHANNEL),
        *(frame.marshal(body.ContentBody(text[at : at + room]), CHANNEL) for at in range(0, len(text), room)),
    ]
    before, after = b"".join(frames).split(placeholder.encode(), 1)
    return before, after
