"""The fast lane against a real broker: the lane does what plain aiormq does with the same messages."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiormq
import pytest

from common.amqp.codec import Confirm, PublishEncoder, ack_frame, packed_seconds
from common.amqp.link import Link, NoLink, open_link
from common.amqp.properties import message_id_of
from common.amqp.topology import QUEUE_ARGUMENTS, begin_publishing, declare
from tests.rabbitmq import RabbitMQ
from tests.support.lane import Heard
from tests.support.polling import until

SIZES = [0, 1, 500, 131_063, 131_064, 131_065, 400_000]  # around frame_max - 8, and several frames


class Lane:
    """A link through the fast lane, with all that it receives."""

    def __init__(self, link: Link, heard: Heard, queue_name: str) -> None:
        self.link = link
        self.encoder = PublishEncoder(queue_name, link.frame_max)
        self.confirms = heard.confirmed
        self.deliveries = heard.delivered
        self.lost = link.lane.gone

    @classmethod
    async def open(cls, url: str, queue_name: str) -> Lane:
        heard = Heard()
        link = await open_link(url, "test", heard)
        await begin_publishing(link, asyncio.Event())
        return cls(link, heard, queue_name)

    def publish(self, body: bytes, number: int) -> None:
        self.link.lane.send(self.encoder.encode(body, b"%032d" % number, packed_seconds(number)))

    async def consume(self, queue_name: str, prefetch: int = 0) -> None:
        await self.link.channel.basic_qos(prefetch_count=prefetch)
        await self.link.channel.basic_consume(queue_name, never)


async def never(_: object) -> None:
    pytest.fail("aiormq got a delivery that was the lane's")


def bodies() -> list[bytes]:
    rng = random.Random(3)
    return [rng.randbytes(size) for size in SIZES] * 3


def confirmed(confirms: list[Confirm]) -> set[int]:
    tags: set[int] = set()
    for tag, multiple, ok in confirms:
        assert ok
        tags |= set(range(1, tag + 1)) if multiple else {tag}
    return tags


@pytest.mark.parametrize("publish_by", ["lane", "aiormq"])
@pytest.mark.parametrize("consume_by", ["lane", "aiormq"])
async def test_messages_of_any_size_arrive_as_through_plain_aiormq(
    broker: RabbitMQ, queue_name: str, publish_by: str, consume_by: str
) -> None:
    sent = bodies()
    lane = await Lane.open(broker.url, queue_name)
    await declare(lane.link.channel, queue_name, QUEUE_ARGUMENTS)
    if publish_by == "lane":
        for number, body in enumerate(sent, 1):
            lane.publish(body, number)
        await until("all is confirmed", lambda: len(confirmed(lane.confirms)) == len(sent))
    got: list[tuple[bytes, str | None]] = []
    async with aiormq.connect(broker.url) as connection:
        channel = await connection.channel()
        if publish_by == "aiormq":
            for number, body in enumerate(sent, 1):
                properties = aiormq.spec.Basic.Properties(message_id=f"{number:032d}", delivery_mode=2)
                await channel.basic_publish(body, routing_key=queue_name, properties=properties)
        if consume_by == "aiormq":

            async def take(message: Any) -> None:
                got.append((message.body, message.header.properties.message_id))

            await channel.basic_consume(queue_name, take)
            await until("all is delivered", lambda: len(got) == len(sent))
        else:
            await lane.consume(queue_name)
            await until("all is delivered", lambda: len(lane.deliveries) == len(sent))
            for delivery in lane.deliveries:
                message_id = message_id_of(delivery.header)
                got.append((delivery.body, message_id.decode() if message_id else None))
    assert got == [(body, f"{number:032d}") for number, body in enumerate(sent, 1)]
    await lane.link.close()


async def test_acks_settle_what_they_cover_and_the_rest_comes_again(broker: RabbitMQ, queue_name: str) -> None:
    lane = await Lane.open(broker.url, queue_name)
    await declare(lane.link.channel, queue_name, QUEUE_ARGUMENTS)
    for number in range(1, 21):
        lane.publish(b"x", number)
    await lane.consume(queue_name, prefetch=20)
    await until("all is delivered", lambda: len(lane.deliveries) == 20)
    lane.link.lane.send([ack_frame(5, True), ack_frame(7, False), ack_frame(20, False)])
    await lane.link.close()
    again = await Lane.open(broker.url, queue_name)
    await again.consume(queue_name)
    await until("all is delivered", lambda: len(again.deliveries) == 13)
    came = {int(message_id_of(delivery.header) or 0) for delivery in again.deliveries}
    assert came == {6, *range(8, 20)}
    assert all(delivery.redelivered for delivery in again.deliveries)
    await again.link.close()


async def test_tags_count_from_one_even_if_blocked_at_once(broker: RabbitMQ, queue_name: str) -> None:
    """Confirms are on before the first event, although it does not wait for their answer."""
    blocked = asyncio.Event()
    blocked.set()
    heard = Heard()
    link = await open_link(broker.url, "test", heard)
    await declare(link.channel, queue_name, QUEUE_ARGUMENTS)
    await begin_publishing(link, blocked)
    Lane(link, heard, queue_name).publish(b"x", 1)
    await until("it is confirmed", lambda: heard.confirmed == [(1, False, True)])
    await link.close()


async def test_a_nack_of_the_broker_arrives_as_one(broker: RabbitMQ, queue_name: str) -> None:
    lane = await Lane.open(broker.url, queue_name)
    arguments: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await lane.link.channel.queue_declare(queue_name, durable=True, arguments=arguments)
    for number in range(1, 11):
        lane.publish(b"x", number)
    await until(
        "ten are confirmed",
        lambda: sum(len(range(1, tag + 1)) if multiple else 1 for tag, multiple, _ in lane.confirms) >= 10,
    )
    assert {ok for _, _, ok in lane.confirms} == {True, False}
    await lane.link.channel.queue_delete(queue_name)
    await lane.link.close()


async def test_a_message_for_a_missing_queue_ends_the_link(broker: RabbitMQ, queue_name: str) -> None:
    """The broker acks the message that it returned, and that ack counts for nothing."""
    lane = await Lane.open(broker.url, queue_name)
    lane.publish(b"x", 1)
    async with asyncio.timeout(10):
        assert "returned: NO_ROUTE" in await lane.lost
    assert lane.confirms == []
    await lane.link.close()


async def test_any_end_of_a_link_is_noticed_at_once(broker: RabbitMQ, queue_name: str) -> None:
    """The ends are a deleted queue, a closed channel and a cut connection."""
    async with aiormq.connect(broker.url) as connection:
        other = await connection.channel()
        for trouble, words in (("delete", "cancelled"), ("ack", "unknown delivery tag"), ("cut", "closed")):
            lane = await Lane.open(broker.url, queue_name)
            await declare(lane.link.channel, queue_name, QUEUE_ARGUMENTS)
            await lane.consume(queue_name)
            if trouble == "delete":
                await other.queue_delete(queue_name)
            elif trouble == "ack":
                lane.link.lane.send([ack_frame(99, False)])
            else:
                lane.link.lane.fail("connection closed by the test")
            async with asyncio.timeout(10):
                assert words in await lane.lost
            await lane.link.close()


async def test_idle_and_busy_connections_outlive_many_heartbeats(broker: RabbitMQ, queue_name: str) -> None:
    url = broker.url + "?heartbeat=1"  # aiormq's grace is then 6 s, the broker's 2 s
    idle, busy = await Lane.open(url, queue_name), await Lane.open(url, queue_name)
    await declare(busy.link.channel, queue_name, QUEUE_ARGUMENTS)
    held = await Lane.open(url, queue_name)
    held.link.lane.hold_back(True)
    loop = asyncio.get_running_loop()
    end, number = loop.time() + 7, 0
    while loop.time() < end:
        number += 1
        busy.publish(b"x", number)
        held.link.lane.keep_alive()
        await asyncio.sleep(0.02)
    held.link.lane.hold_back(False)
    await until("all is confirmed", lambda: len(confirmed(busy.confirms)) == number)
    for lane in (idle, busy, held):
        assert not lane.lost.done()
        await lane.link.channel.basic_qos(prefetch_count=1)  # answers: the link works
        await lane.link.close()


async def test_the_lane_verifies_tls_with_its_own_ca(broker: RabbitMQ, queue_name: str) -> None:
    """Without that CA, the certificate is refused."""
    url, ca_file = f"amqps://guest:guest@127.0.0.1:{broker.tls_port}/", broker.ca_file
    with pytest.raises(NoLink, match=r"certificate is refused.*cafile"):
        await open_link(url, "test", Heard())
    lane = await Lane.open(f"{url}?cafile={ca_file}", queue_name)
    await declare(lane.link.channel, queue_name, QUEUE_ARGUMENTS)
    sent = bodies()
    for number, body in enumerate(sent, 1):
        lane.publish(body, number)
    await until("all is confirmed", lambda: len(confirmed(lane.confirms)) == len(sent))
    await lane.consume(queue_name)
    await until("all is delivered", lambda: len(lane.deliveries) == len(sent))
    assert [delivery.body for delivery in lane.deliveries] == sent
    await lane.link.close()
