"""Poison on its way to the dead letters: first in flight to the broker, then in a file when that takes too long.

So dead-letter trouble never stops good events. Poison that stayed unacked would fill the prefetch, keep the queue's log
from being truncated, and run into the broker's consumer_timeout.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from common.consumer.dead_letters.mover import DeadLetters
from common.consumer.dead_letters.spill import DamagedLine, Spill
from common.consumer.metrics import Counters
from common.consumer.prepare import Poison

log = logging.getLogger("predlog.dead_letters")

SPILL_AFTER_SECONDS = 3.0  # longer than a reconnect takes
RETRY_SECONDS = 2.0


class Outgoing:
    """The owner of unacked poison. It calls `acknowledge(delivery tags)` once messages are safe.

    `in_thread` runs a call in the thread of the store.
    """

    def __init__(
        self,
        mover: DeadLetters,
        spill: Spill,
        in_thread: Callable[..., Awaitable[Any]],
        acknowledge: Callable[[Sequence[int]], None],
        counters: Counters,
    ) -> None:
        self._mover = mover
        self._spill = spill
        self._in_thread = in_thread
        self._acknowledge = acknowledge
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._held: dict[int, tuple[float, Poison, asyncio.Task[None]]] = {}  # by delivery tag, oldest first
        self._unspilling: asyncio.Task[None] | None = None
        self._full = False
        self._spill_failed = False
        if spill.waiting:
            log.warning("dead letters wait in %s from an earlier run", spill.path)
            self._start_unspilling()

    @property
    def held(self) -> dict[int, tuple[float, Poison, asyncio.Task[None]]]:
        """What is unacked, by delivery tag."""
        return self._held

    @property
    def oldest_since(self) -> float | None:
        return next(iter(self._held.values()))[0] if self._held else None

    @property
    def spilled_bytes(self) -> int:
        return self._spill.bytes

    def trouble(self) -> str:
        """Return why dead letters do not reach the broker, as a sentence; "" when they do."""
        if self._full:
            return f"dead letters do not reach the broker, and {self._spill.path} is full"
        if self._spill.waiting:
            return f"dead letters do not reach the broker; they wait in {self._spill.path}"
        return ""

    def take(self, poison: Sequence[Poison]) -> None:
        """Begin to dead-letter messages of the present connection."""
        now = self._loop.time()
        for each in poison:
            task = asyncio.create_task(self._move(each))
            self._held[each.delivery.delivery_tag] = now, each, task

    def forget(self) -> None:
        """Drop what is held, when its connection is lost: it is delivered again."""
        for _, _, task in self._held.values():
            task.cancel()
        self._held.clear()

    def overdue(self) -> bool:
        """Tell whether what is held must go to the file: it waited too long, or others wait there already."""
        since = self.oldest_since
        if since is None or (self._full and self._spill.waiting):
            return False
        return self._spill.waiting or self._loop.time() - since > SPILL_AFTER_SECONDS

    async def spill(self) -> None:
        """Put what is held into the file and acknowledge it. In disk trouble it stays held."""
        tags, poison = list(self._held), [each for _, each, _ in self._held.values()]
        if not self._spill.waiting and not self._spill_failed:
            log.warning("the broker does not take dead letters; they wait in %s", self._spill.path)
        try:
            count = await self._in_thread(self._spill.append, poison)
        except OSError as error:
            if not self._spill_failed:
                log.error("cannot write dead letters to %s: %s; retrying", error.filename, error.strerror)
            self._spill_failed = True
            return
        self._spill_failed = False
        if count < len(poison) and not self._full:
            log.error("%s is full; messages that are not events stay in the queue", self._spill.path)
        self._full = count < len(poison)
        safe = []
        for tag, each in zip(tags[:count], poison, strict=False):
            held = self._held.get(tag)
            if held is not None and held[1] is each:  # neither confirmed nor lost in the meantime
                held[2].cancel()
                del self._held[tag]
                safe.append(tag)
        self._acknowledge(sorted(safe))
        self._start_unspilling()

    async def settled(self) -> None:
        """Wait until nothing is in flight to the broker."""
        if self._held:
            await asyncio.wait([task for _, _, task in self._held.values()])

    async def close(self) -> None:
        tasks = [task for _, _, task in self._held.values()]
        if self._unspilling is not None:
            tasks.append(self._unspilling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._mover.close()

    async def _move(self, poison: Poison) -> None:
        """Dead-letter one message. After a bug it stays held, and goes to the file."""
        try:
            await self._mover.move(poison.delivery, poison.reason)
        except Exception:
            log.exception("a bug: a message could not be dead-lettered")
            return
        self._count(poison)
        tag = poison.delivery.delivery_tag
        if self._held.pop(tag, None) is not None:
            self._acknowledge([tag])

    def _count(self, poison: Poison) -> None:
        self._counters.metrics.values[self._counters.dead_letters[poison.kind]] += 1.0

    def _start_unspilling(self) -> None:
        if self._unspilling is None or self._unspilling.done():
            self._unspilling = asyncio.create_task(self._unspill())

    async def _unspill(self) -> None:
        """Move what is in the file, a page at a time. A crash may move a page twice; the ids identify doubles."""
        said = ""
        while self._spill.waiting:
            try:
                page, size = await self._in_thread(self._spill.page)
                await asyncio.gather(*(self._mover.move(each.delivery, each.reason) for each in page))
                await self._in_thread(self._spill.remove, size)
                for each in page:
                    self._count(each)
                self._full, said = False, ""
            except DamagedLine as error:
                aside = await self._in_thread(self._spill.set_aside)
                log.error("%s has %s; it was moved to %s", self._spill.path, error, aside)
            except Exception as error:
                if said != (said := repr(error)):
                    log.error("cannot move the dead letters in %s: %s; retrying", self._spill.path, said)
                await asyncio.sleep(RETRY_SECONDS)
        log.info("all dead letters that waited in the file are in the queue")
