"""The queues: names, arguments, declaration, and the beginning of consuming and of publishing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiormq.abc import AbstractChannel
from pamqp import commands
from pamqp.frame import marshal
from pamqp.header import ContentHeader

from common.amqp.codec import HOT_CHANNEL
from common.amqp.link import CALL_TIMEOUT_SECONDS, Link, quiet_task

# x-delivery-limit: RabbitMQ 4.x drops a message at its 20th return unless a limit is set, and 3.10 reads -1, which
# means "no limit" in 4.x, as zero. The largest number that both take keeps a message through any number of reconnects.
# x-single-active-consumer: a standby is sent nothing, so that it holds no unacked messages (RabbitMQ 3.8 and later).
QUEUE_ARGUMENTS: Mapping[str, str | int | bool] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 2**31 - 1,
    "x-single-active-consumer": True,
}


# A message to a queue that does not exist, and the beginning of confirms.
_BEFORE_EVENTS = b"".join(
    marshal(frame, HOT_CHANNEL)
    for frame in (
        commands.Basic.Publish(routing_key="predlog.no-such-queue"),
        ContentHeader(),
        commands.Confirm.Select(nowait=True),
    )
)


def queue_names(queue_name: str, partitions: int) -> list[str]:
    """Return the queue of each partition. A single partition has the plain name."""
    return [queue_name] if partitions == 1 else [f"{queue_name}.{partition}" for partition in range(partitions)]


def dead_letter_queue(queue_name: str) -> str:
    return queue_name + ".dead"


async def declare(channel: AbstractChannel, queue_name: str, arguments: Mapping[str, str | int | bool]) -> None:
    """Declare a durable queue. The broker closes the channel if one exists with other arguments."""
    async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
        await channel.queue_declare(queue_name, durable=True, arguments=dict(arguments))


async def consume(channel: AbstractChannel, queue_name: str) -> str:
    """Begin to consume on the hot channel; return the consumer tag. The fast lane takes the deliveries."""

    async def not_called(_: object) -> None:
        """Satisfy aiormq, which needs a callback."""

    return (await channel.basic_consume(queue_name, not_called)).consumer_tag or ""


async def begin_publishing(link: Link, blocked: asyncio.Event) -> None:
    """Turn on the confirms of the hot channel, and find out whether an event could be published.

    Whatever the lane sends afterwards has delivery tags from 1: the message that goes before has none, and is dropped.
    The broker closes the channel if the user may not write to the default exchange. During an alarm the broker sends
    connection.blocked to connections that publish, on which the listener sets `blocked`. It answers only when the alarm
    is over, so this does not wait for the answer then.
    """
    link.lane.send([_BEFORE_EVENTS])
    answered = quiet_task(link.channel.confirm_delivery())  # again, for an answer; its cancellation closes the channel
    blocking = asyncio.ensure_future(blocked.wait())
    try:
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await asyncio.wait({answered, blocking}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        blocking.cancel()
    if answered.done():
        answered.result()
