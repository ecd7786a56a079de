"""Messages in queues of another number of partitions, which no consumer serves.

They are left over when PARTITIONS is changed before the old queues are empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiormq
from aiormq.abc import AbstractConnection

from common.amqp.link import CALL_TIMEOUT_SECONDS, CONNECTION_ERRORS, Link, cancelled

log = logging.getLogger("predlog.consumer")

POLL_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 30.0


class Unserved:
    """A watch for such messages, once for each connection, and repeatedly while there are some."""

    def __init__(self, queue_name: str, partitions: int, link: Callable[[], Link | None]) -> None:
        self.messages = 0
        self._queue_name = queue_name
        self._partitions = partitions
        self._link = link
        self._reason = ""

    def reason(self) -> str:
        """Return where messages wait, as a sentence; "" when none do."""
        return self._reason

    async def watch(self) -> None:
        """Look for messages until cancelled."""
        loop, looked_at, looked_on = asyncio.get_running_loop(), 0.0, None
        while True:
            link, now = self._link(), loop.time()
            due = link is not looked_on or (self.messages and now - looked_at > LOOK_AGAIN_SECONDS)
            if link is not None and due:
                looked_at, looked_on = now, link
                try:
                    async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                        self._note(await self._look(link.connection))
                except (*CONNECTION_ERRORS, asyncio.CancelledError) as error:
                    if cancelled():
                        raise
                    log.debug("while looking for queues without consumers: %r", error)
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self, connection: AbstractConnection) -> dict[str, int]:
        """Return the number of messages in each such queue that has some. The first missing number ends the search."""
        name, number = self._queue_name, self._partitions
        found: dict[str, int] = {}
        if number == 1:
            number = 0
        else:
            found[name] = await _abandoned(connection, name) or 0
        while (count := await _abandoned(connection, f"{name}.{number}")) is not None:
            found[f"{name}.{number}"] = count
            number += 1
        return {queue: count for queue, count in found.items() if count}

    def _note(self, found: dict[str, int]) -> None:
        reason = ""
        if found:
            queues = ", ".join(f"{count} in '{queue}'" for queue, count in found.items())
            reason = f"messages wait in queues that no consumer serves with PARTITIONS={self._partitions}: {queues}"
        if reason and not self._reason:
            log.warning("%s; see docs/scaling.md on changing PARTITIONS", reason)
        elif self._reason and not reason:
            log.info("no messages wait in queues of another PARTITIONS any more")
        self.messages, self._reason = sum(found.values()), reason


async def _abandoned(connection: AbstractConnection, queue_name: str) -> int | None:
    """Return the number of messages in a queue without consumers; None if it does not exist or is not readable.

    It takes a separate channel, because a missing queue closes the channel.
    """
    channel = await connection.channel()
    try:
        queue = await channel.queue_declare(queue_name, passive=True)
    except aiormq.exceptions.ChannelClosed:
        return None
    await channel.close()
    return 0 if queue.consumer_count else queue.message_count or 0
