"""Messages that no consumer takes: in queues of another number of partitions, and dead letters of predlog 1.0.

The first are left over when PARTITIONS is changed before the old queues are empty, the others by an upgrade. A look
has a connection of its own, so that nothing that happens to it concerns rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiormq
from aiormq.abc import AbstractConnection

from common.amqp.codec import Confirm, Delivery
from common.amqp.link import CALL_TIMEOUT_SECONDS, cancelled, open_link
from common.amqp.topology import dead_letter_queue

log = logging.getLogger("predlog.consumer")

LOOK_AGAIN_SECONDS = 60.0


class Deaf:
    """The listener of a link on which nothing hot is expected."""

    def deliveries(self, deliveries: list[Delivery]) -> None: ...

    def confirms(self, confirms: list[Confirm]) -> None: ...

    def blocked(self, reason: str) -> None: ...


class Leftovers:
    """A look for such messages, again every minute while there are some in queues of another PARTITIONS.

    Without a `base_queue_name`, the name without a partition's number, it looks only for dead letters.
    """

    def __init__(self, url: Callable[[], str], queue_name: str, partitions: int, base_queue_name: str) -> None:
        self.messages = 0  # in queues of another PARTITIONS
        self.reason = ""  # where they wait, as a sentence; "" when there are none
        self._url = url
        self._queue_name = queue_name
        self._partitions = partitions
        self._base_queue_name = base_queue_name

    async def watch(self, started: asyncio.Event) -> None:
        """Look once `started` is set, until cancelled."""
        await started.wait()
        await self.look(with_dead_letters=True)
        while True:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            if self.messages:
                await self.look(with_dead_letters=False)

    async def look(self, with_dead_letters: bool) -> None:
        """Look once, and log what is new. A failure is of no consequence."""
        try:
            async with asyncio.timeout(3 * CALL_TIMEOUT_SECONDS):
                link = await open_link(self._url(), "leftovers", Deaf())
                try:
                    if with_dead_letters:
                        await self._look_for_dead_letters(link.connection)
                    if self._base_queue_name:
                        self._note(await self._unserved(link.connection))
                finally:
                    await link.close()
        except (Exception, asyncio.CancelledError) as error:
            if cancelled():
                raise
            log.debug("while looking for messages left over: %r", error)

    async def _look_for_dead_letters(self, connection: AbstractConnection) -> None:
        name = dead_letter_queue(self._queue_name)
        if count := await messages_in(connection, name):
            log.warning("%d dead letters of predlog 1.0 wait in '%s'; --replay-dead-letters empties it", count, name)

    async def _unserved(self, connection: AbstractConnection) -> dict[str, int]:
        """Return the number of messages in each such queue that has some. The first missing number ends the search."""
        name, number = self._base_queue_name, self._partitions
        found: dict[str, int] = {}
        if number == 1:
            number = 0
        else:
            found[name] = await messages_in(connection, name) or 0
        while (count := await messages_in(connection, f"{name}.{number}")) is not None:
            found[f"{name}.{number}"] = count
            number += 1
        return {queue: count for queue, count in found.items() if count}

    def _note(self, found: dict[str, int]) -> None:
        reason = ""
        if found:
            queues = ", ".join(f"{count} in '{queue}'" for queue, count in found.items())
            reason = f"messages wait in queues that no consumer serves with PARTITIONS={self._partitions}: {queues}"
        if reason and not self.reason:
            log.warning("%s; see docs/scaling.md on changing PARTITIONS", reason)
        elif self.reason and not reason:
            log.info("no messages wait in queues of another PARTITIONS any more")
        self.messages, self.reason = sum(found.values()), reason


async def messages_in(connection: AbstractConnection, queue_name: str) -> int | None:
    """Return the number of messages in a queue, 0 if it has a consumer; None if it does not exist or is not readable.

    It takes a separate channel, because a missing queue closes the channel.
    """
    channel = await connection.channel()
    try:
        queue = await channel.queue_declare(queue_name, passive=True)
    except aiormq.exceptions.ChannelClosed:
        return None
    await channel.close()
    return 0 if queue.consumer_count else queue.message_count or 0
