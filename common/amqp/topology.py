"""The queues: names, arguments, declaration, and the check that the user may publish."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection

from common.amqp.link import CALL_TIMEOUT_SECONDS
from common.errors import StartupError

# x-delivery-limit: RabbitMQ 4.x drops a message at its 20th return unless a limit is set, and 3.10 reads -1, which
# means "no limit" in 4.x, as zero. The largest number that both take keeps a message through any number of reconnects.
# x-single-active-consumer: a standby is sent nothing, so that it holds no unacked messages (RabbitMQ 3.8 and later).
QUEUE_ARGUMENTS: Mapping[str, str | int | bool] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 2**31 - 1,
    "x-single-active-consumer": True,
}
DEAD_LETTER_ARGUMENTS: Mapping[str, str | int | bool] = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}


# No queue has this name. A message to it is returned, or refused if the user may not publish.
_NO_QUEUE = "predlog.no-such-queue"


def queue_names(queue_name: str, partitions: int) -> list[str]:
    """Return the queue of each partition. A single partition has the plain name."""
    return [queue_name] if partitions == 1 else [f"{queue_name}.{partition}" for partition in range(partitions)]


def dead_letter_queue(queue_name: str) -> str:
    return queue_name + ".dead"


async def declare(channel: AbstractChannel, queue_name: str, arguments: Mapping[str, str | int | bool]) -> None:
    """Declare a durable queue. Raise StartupError, which names the difference, if it exists with other arguments."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await channel.queue_declare(queue_name, durable=True, arguments=dict(arguments))
    except (aiormq.exceptions.ChannelPreconditionFailed, aiormq.exceptions.ChannelLockedResource) as error:
        said = str(error.args[0] if error.args else error).removeprefix("PRECONDITION_FAILED - ")
        raise StartupError(
            f"queue '{queue_name}' exists with other arguments: {said}. Delete it, or set QUEUE_NAME to another name"
        ) from None


async def consume(channel: AbstractChannel, queue_name: str) -> str:
    """Begin to consume on the hot channel; return the consumer tag. The fast lane takes the deliveries."""

    async def not_called(_: object) -> None:
        """Satisfy aiormq, which needs a callback."""

    return (await channel.basic_consume(queue_name, not_called)).consumer_tag or ""


async def check_may_publish(connection: AbstractConnection) -> None:
    """Publish an unroutable message on a separate channel, and wait until it is returned.

    It meets what a client's first event would meet. Raise ChannelAccessRefused if the user may not write to the default
    exchange. During an alarm the broker sends connection.blocked to connections that publish, and may never return the
    message.
    """
    channel = await connection.channel()
    try:
        await channel.basic_publish(b"", routing_key=_NO_QUEUE, mandatory=True)
    except aiormq.exceptions.PublishError:
        await channel.close()
