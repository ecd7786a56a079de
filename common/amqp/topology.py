"""The queues: their names and arguments, how they are declared, and whether they may be published to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection

from common.amqp.link import CONNECT_TIMEOUT_SECONDS
from common.errors import StartupError

# x-delivery-limit: RabbitMQ 4.x drops a message at its 20th return unless a limit is set, and 3.10 takes the -1 that
# means "none" to 4.x for zero. The largest number that both take keeps every message through any number of reconnects.
# x-single-active-consumer: a standby gets nothing, so that it sits on no unacked messages (RabbitMQ 3.8 and later).
QUEUE_ARGUMENTS: Mapping[str, str | int | bool] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 2**31 - 1,
    "x-single-active-consumer": True,
}
DEAD_LETTER_ARGUMENTS: Mapping[str, str | int | bool] = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}


# A name that no queue has: a message to it is returned, or refused if its user may publish nothing.
_NO_QUEUE = "predlog.no-such-queue"


def queue_names(queue_name: str, partitions: int) -> list[str]:
    """Return the queue of each partition. A single partition has the plain name."""
    return [queue_name] if partitions == 1 else [f"{queue_name}.{partition}" for partition in range(partitions)]


def dead_letter_queue(queue_name: str) -> str:
    return queue_name + ".dead"


async def declare(channel: AbstractChannel, queue_name: str, arguments: Mapping[str, str | int | bool]) -> None:
    """Declare a durable queue; raises StartupError when it exists with other arguments, naming the difference."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            await channel.queue_declare(queue_name, durable=True, arguments=dict(arguments))
    except (aiormq.exceptions.ChannelPreconditionFailed, aiormq.exceptions.ChannelLockedResource) as error:
        said = str(error.args[0] if error.args else error).removeprefix("PRECONDITION_FAILED - ")
        raise StartupError(
            f"queue '{queue_name}' exists with other arguments: {said}. Delete it, or set QUEUE_NAME to another name"
        ) from None


async def check_may_publish(connection: AbstractConnection) -> None:
    """Publish what cannot be routed, on a channel of its own, and wait until it is returned.

    It meets what the first event of a client would meet. Raises ChannelAccessRefused when the user may not write to the
    default exchange. During an alarm the broker says connection.blocked because of it, as it does only to connections
    that publish; the message may then never be returned.
    """
    channel = await connection.channel()
    try:
        await channel.basic_publish(b"", routing_key=_NO_QUEUE, mandatory=True)
    except aiormq.exceptions.PublishError:
        await channel.close()
