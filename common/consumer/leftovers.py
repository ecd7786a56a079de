"""Messages that no consumer serves: in queues of another number of partitions, and dead letters of predlog 1.0.

The first are left over when PARTITIONS is changed before the old queues are empty, the others by an upgrade.
"""

from __future__ import annotations

from itertools import chain, count

import aiormq
from aiormq.abc import AbstractConnection

from common.amqp.lane import LaneListener
from common.amqp.link import open_link
from common.amqp.topology import dead_letter_queue


class Deaf(LaneListener):
    """The listener of a link on which no hot frames are expected."""


async def look(url: str, queue_name: str, partitions: int, base_queue_name: str) -> dict[str, int]:
    """Return the number of messages in each such queue that is not empty. Raise what aiormq raises.

    Without a `base_queue_name`, the name without a partition's number, it looks only for dead letters. The first
    missing number ends the search. It has a connection of its own, so that its trouble never affects rows.
    """
    link = await open_link(url, "leftovers", Deaf())
    try:
        dead = dead_letter_queue(queue_name)
        found = {dead: await messages_in(link.connection, dead) or 0}
        numbered = (f"{base_queue_name}.{number}" for number in count(partitions if partitions > 1 else 0))
        for name in chain([base_queue_name] if partitions > 1 else [], numbered) if base_queue_name else ():
            messages = await messages_in(link.connection, name)
            if messages is None and name != base_queue_name:
                break
            found[name] = messages or 0
    finally:
        await link.close()
    return {name: messages for name, messages in found.items() if messages}


async def messages_in(connection: AbstractConnection, queue_name: str) -> int | None:
    """Return the number of messages in a queue, 0 if it has a consumer; None if it does not exist or is not readable.

    It uses a separate channel, because a missing queue closes the channel.
    """
    channel = await connection.channel()
    try:
        queue = await channel.queue_declare(queue_name, passive=True)
    except aiormq.exceptions.ChannelClosed:
        return None
    await channel.close()
    return 0 if queue.consumer_count else queue.message_count or 0
