"""Links without a broker, and listeners that keep what they get."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

from common.amqp.codec import Confirm, Delivery
from common.amqp.link import Link

_ACK = struct.Struct(">BHIHHQBB")  # type, channel, size, class, method, delivery tag, multiple, end of frame


class Heard:
    """The listener of a link, which keeps everything."""

    def __init__(self) -> None:
        self.delivered: list[Delivery] = []
        self.confirmed: list[Confirm] = []
        self.blocks: list[str] = []
        self.downs: list[str] = []

    def deliveries(self, deliveries: list[Delivery]) -> None:
        self.delivered += deliveries

    def confirms(self, confirms: list[Confirm]) -> None:
        self.confirmed += confirms

    def blocked(self, reason: str) -> None:
        self.blocks.append(reason)

    async def up(self, link: Link) -> None:
        """Set nothing up."""

    def down(self, reason: str) -> None:
        self.downs.append(reason)


class FakeLane:
    """What a FastLane does for a sender. Make it while a loop runs."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.congested = False
        self.held_back = False
        self.kept_alive = 0

    @property
    def lost(self) -> str | None:
        return self.gone.result() if self.gone.done() else None

    def send(self, parts: Iterable[bytes]) -> None:
        self.sent.append(b"".join(parts))

    def hold_back(self, held: bool) -> None:
        self.held_back = held

    def keep_alive(self) -> None:
        self.kept_alive += 1

    def fail(self, reason: str) -> None:
        if not self.gone.done():
            self.gone.set_result(reason)

    @property
    def acks(self) -> list[tuple[int, bool]]:
        """Delivery tag and `multiple` of each ack, in the order they were sent."""
        frames = list(_ACK.iter_unpack(b"".join(self.sent)))
        assert all(frame[3:5] == (60, 80) and frame[7] == 0xCE for frame in frames), "something else was sent"
        return [(frame[5], bool(frame[6])) for frame in frames]


class FakeChannel:
    """A channel that answers at once, and notes the calls. A passive declare returns `waiting` and `consumers`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.waiting = 0
        self.consumers = 1

    async def queue_declare(self, queue: str, **arguments: Any) -> Any:
        self.calls.append(f"declare {queue}")
        return SimpleNamespace(message_count=self.waiting, consumer_count=self.consumers)

    async def basic_qos(self, prefetch_count: int) -> None:
        self.calls.append(f"qos {prefetch_count}")

    async def basic_consume(self, queue: str, callback: object) -> Any:
        self.calls.append(f"consume {queue}")
        return SimpleNamespace(consumer_tag="tag")


class FakeLink:
    """`link` is what a listener gets."""

    def __init__(self) -> None:
        self.lane = FakeLane()
        self.channel = FakeChannel()
        self.link = cast(Link, self)
