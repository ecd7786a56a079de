"""The loop of the consumer: deliveries in, batch after batch into the store, acks out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from common.amqp.codec import Delivery, ack_frame, ack_frames
from common.amqp.link import CLOSE_TIMEOUT_SECONDS, CONNECT_TIMEOUT_SECONDS, Link, cancelled
from common.amqp.topology import DEAD_LETTER_ARGUMENTS, QUEUE_ARGUMENTS, dead_letter_queue, declare
from common.config import ConsumerSettings
from common.consumer import pending
from common.consumer.dead_letters import mover
from common.consumer.metrics import Counters
from common.consumer.prepare import Poison, Prepared, prepare_batch
from common.storage.store import Store

log = logging.getLogger("predlog.consumer")

T = TypeVar("T")

HELD_BACK_BYTES = 64 * 1024 * 1024  # of deliveries in memory; beyond it the broker's socket is not read
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.1, 5.0
STANDBY_POLL_SECONDS = TROUBLE_POLL_SECONDS = 0.25
IDLE_SECONDS = 1.0


class Consumer:
    """Takes deliveries, stores them batch by batch, acks. `run` is the loop; all else feeds it or hears of it."""

    def __init__(
        self, settings: ConsumerSettings, store: Store, thread: ThreadPoolExecutor, counters: Counters
    ) -> None:
        self.trouble = ""  # why batches cannot be stored now
        self.down = "not connected yet"  # why there is no link; "" while there is
        self._settings = settings
        self._store = store
        self._thread = thread  # the only one that touches the store
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._pending = pending.Pending(
            settings.batch_max_rows, settings.prefetch_count, settings.flush_interval_ms / 1000
        )
        self._link: Link | None = None
        self._consumer_tag = ""
        self._held: dict[int, float] = {}  # delivery tags on their way to the dead letters, and since when
        self._burials: set[asyncio.Task[None]] = set()
        self._dead_letters = mover.DeadLetters(settings.amqp_url, settings.queue_name)
        self._in_store: tuple[int, float] | None = None  # messages in the batch being stored, and since when
        self._wake = asyncio.Event()
        self._draining = False
        self._reopen_due = False
        self._rotation_trouble = False

    # The broker

    async def prepare(self, link: Link) -> None:
        """Set up a new connection: queues, prefetch, consume."""
        settings = self._settings
        await declare(link.channel, settings.queue_name, QUEUE_ARGUMENTS)
        await declare(link.channel, dead_letter_queue(settings.queue_name), DEAD_LETTER_ARGUMENTS)
        # RabbitMQ cuts a link that is not read for half a minute: in trouble, the next one takes nothing until it ends.
        while self.trouble and not self._draining:
            if link.lane.lost is not None:
                raise ConnectionError(link.lane.lost)
            self.down = ""  # there is a link
            await asyncio.sleep(TROUBLE_POLL_SECONDS)
        if self._draining:
            return  # nothing new; the link is only kept up
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            await link.channel.basic_qos(prefetch_count=settings.prefetch_count)
            self._link, self.down = link, ""
            link.lane.on_deliveries = self.on_deliveries
            consuming = await link.channel.basic_consume(settings.queue_name, _not_called)
        self._consumer_tag = consuming.consumer_tag or ""
        if self._draining:  # since a moment ago
            await link.channel.basic_cancel(self._consumer_tag, nowait=True)

    def on_down(self, reason: str) -> None:
        """What was not stored yet comes again; acks for this link have no meaning any more."""
        self._link, self.down = None, reason
        self._pending.take()
        self._held.clear()
        for task in self._burials:  # these messages come again too
            task.cancel()
        self._counters.metrics.values[self._counters.reconnects] += 1.0

    def on_trouble(self, reason: str) -> None:
        self.down = reason

    def on_deliveries(self, deliveries: list[Delivery]) -> None:
        values, counters = self._counters.metrics.values, self._counters
        values[counters.deliveries] += len(deliveries)
        if deliveries[0].redelivered or deliveries[-1].redelivered:
            values[counters.redeliveries] += sum(delivery.redelivered for delivery in deliveries)
        was_empty = not self._pending.deliveries
        self._pending.add(deliveries, self._loop.time())
        if was_empty or self._pending.full:
            self._wake.set()
        if self._pending.bytes > HELD_BACK_BYTES and self._link is not None:
            self._link.lane.hold_back(True)

    # The loop

    async def run(self) -> None:
        """Store batch after batch, until drained."""
        while await self._batch_is_due():
            link, deliveries = self._link, self._pending.take()
            if link is not None:
                link.lane.hold_back(False)
            self._in_store = (len(deliveries), self._loop.time())
            prepared = await self._in_thread(
                prepare_batch, deliveries, self._store.seen, self._settings.low_prob_threshold
            )
            if prepared.ids or prepared.data:
                await self._store_until_done(prepared)
            self._in_store = None
            self._bury(link, prepared.poison)
            self._ack(link, prepared.stored)
            self._counters.metrics.values[self._counters.duplicates] += prepared.duplicates

    async def _batch_is_due(self) -> bool:
        """Wait for the next batch; False once there is nothing more to come."""
        while True:
            await self._between_batches()
            wait = self._pending.due_in(self._loop.time())
            if wait == 0.0 or (self._draining and wait is not None):
                return True
            if self._draining:
                return False
            self._wake.clear()
            with suppress(TimeoutError):  # not wait_for: that of Python 3.11 may swallow a cancellation
                async with asyncio.timeout(IDLE_SECONDS if wait is None else wait):
                    await self._wake.wait()

    async def _between_batches(self) -> None:
        """What may only happen while no batch is under way: rotation, reopening."""
        settings, store = self._settings, self._store
        try:
            if pending.rotation_due(
                store.committed_bytes, time.time() - store.started_at, settings.rotate_bytes, settings.rotate_interval
            ):
                await self._in_thread(store.rotate)
            if self._reopen_due:
                self._reopen_due = False
                await self._in_thread(store.reopen)
            self._rotation_trouble = False
        except OSError as error:
            if not self._rotation_trouble:
                log.error("cannot begin a new file: %s: %s; trying on", error.filename, error.strerror)
            self._rotation_trouble = True

    async def _store_until_done(self, prepared: Prepared) -> None:
        """Append a batch; in trouble (disk full, I/O error) wait and try again: nothing is acked before it is safe."""
        counters, delay = self._counters, RETRY_FIRST_SECONDS
        while True:
            try:
                timing = await self._in_thread(self._store.append, prepared.data, prepared.ids)
                break
            except OSError as error:
                counters.metrics.values[counters.store_failures] += 1.0
                trouble = f"{error.filename}: {error.strerror}"
                if not self.trouble:
                    log.error("cannot store: %s; nothing is acked, trying on", trouble)
                self.trouble = trouble
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_MOST_SECONDS)
        if self.trouble:
            log.info("storing again")
            self.trouble = ""
        counters.metrics.values[counters.rows] += prepared.rows
        counters.batch_rows.observe(prepared.rows)
        counters.write_seconds.observe(timing.write_seconds)
        counters.fsync_seconds.observe(timing.fsync_seconds)
        counters.commit_seconds.observe(timing.commit_seconds)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        return await self._loop.run_in_executor(self._thread, call, *args)

    def _ack(self, link: Link | None, tags: Sequence[int]) -> None:
        """Ack on the link that delivered, if it is still the one: on another channel the tags mean other messages."""
        if link is not None and link is self._link and link.lane.lost is None:
            link.lane.send([ack_frames(pending.ack_ranges(tags, self._held))])

    def _bury(self, link: Link | None, poison: Sequence[Poison]) -> None:
        if link is not self._link:
            return  # they come again, on the new link
        for each in poison:
            log.warning("a message that is not an event goes to the dead letters: %s", each.reason)
            self._held[each.delivery.delivery_tag] = self._loop.time()
            task = asyncio.create_task(self._bury_one(link, each))
            self._burials.add(task)
            task.add_done_callback(self._buried)

    def _buried(self, task: asyncio.Task[None]) -> None:
        self._burials.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a bug: a message could not be buried", exc_info=task.exception())
            if self._link is not None:
                self._link.lane.fail("a message could not be buried")

    async def _bury_one(self, link: Link | None, poison: Poison) -> None:
        await self._dead_letters.bury(poison.delivery, poison.reason)
        self._counters.metrics.values[self._counters.dead_letters[poison.kind]] += 1.0
        tag = poison.delivery.delivery_tag
        if link is self._link and self._held.pop(tag, None) is not None:
            assert link is not None
            link.lane.send([ack_frame(tag, False)])

    # Watching, and the end

    def not_ready(self) -> str:
        """Why no event would reach the CSV now; "" when it would."""
        if self.trouble:
            return f"cannot store: {self.trouble}"
        return f"no broker: {self.down}" if self.down else ""

    def tick(self) -> None:
        """Once a second: the gauges, and aiormq's liveness clock while we do not read."""
        values, counters, now = self._counters.metrics.values, self._counters, self._loop.time()
        if self._link is not None:
            self._link.lane.keep_alive()
        counters.metrics.settle()
        since = list(self._held.values())
        if self._pending.deliveries:
            since.append(self._pending.since)
        in_store = 0
        if self._in_store is not None:
            in_store = self._in_store[0]
            since.append(self._in_store[1])
        values[counters.unacked] = len(self._pending.deliveries) + len(self._held) + in_store
        values[counters.oldest_unacked] = now - min(since, default=now)
        values[counters.csv_bytes] = self._store.committed_bytes
        values[counters.store_ok] = not self.trouble
        values[counters.connected] = not self.down

    def reopen(self) -> None:
        """Somebody (logrotate) moved the CSV: begin a new one before the next batch."""
        self._reopen_due = True
        self._wake.set()

    async def drain(self, running: asyncio.Task[None]) -> None:
        """Take no more deliveries; store, ack and bury what is here."""
        link, self._draining = self._link, True
        if link is not None and link.lane.lost is None:
            try:
                # No answer wanted: it would come behind all deliveries under way, and not at all while held back.
                async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                    await link.channel.basic_cancel(self._consumer_tag, nowait=True)
            except (Exception, asyncio.CancelledError) as error:
                if cancelled():
                    raise
                log.debug("while cancelling: %r", error)
        self._wake.set()
        await running
        if self._burials:
            await asyncio.wait(self._burials)

    async def close(self) -> None:
        for task in self._burials:
            task.cancel()
        await self._dead_letters.close()


async def _not_called(_: object) -> None:
    """aiormq wants a callback; the fast lane takes the deliveries before aiormq sees them."""
