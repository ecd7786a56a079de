"""The consumer's loop: deliveries in, batches into the store, acks out.

The event loop owns everything here. The store has a thread of its own, one call at a time: prepare a batch, which
reads the ids that the journal remembers; append it; rotate; reopen. The event loop only reads the committed bytes
and the period of the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from common.amqp.codec import Confirm, Delivery, ack_frames
from common.amqp.link import CALL_TIMEOUT_SECONDS, CLOSE_TIMEOUT_SECONDS, CONNECTION_ERRORS, Link, cancelled
from common.amqp.topology import DEAD_LETTER_ARGUMENTS, QUEUE_ARGUMENTS, consume, dead_letter_queue, declare
from common.config import ConsumerSettings
from common.consumer.dead_letters.mover import DeadLetters
from common.consumer.dead_letters.outgoing import Outgoing
from common.consumer.dead_letters.spill import Spill
from common.consumer.metrics import Counters
from common.consumer.pending import Pending, ack_ranges
from common.consumer.prepare import Prepared, prepare_batch
from common.storage.store import Store, Timing

log = logging.getLogger("predlog.consumer")

T = TypeVar("T")

HELD_BACK_BYTES = 64 * 1024 * 1024  # of deliveries in memory; beyond it the broker's socket is not read
TRICKLE_BYTES, TRICKLE_SECONDS = 16 * 1024, 0.05  # what is less, and for as long at most, may wait in the socket
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.1, 5.0
TROUBLE_POLL_SECONDS = 0.25
IDLE_SECONDS = 1.0
STALL_SECONDS = 10.0  # after so long without progress, waiting work is reported as stalled


class Worker:
    """The listener of a link, and the loop (`run`) that stores its deliveries batch by batch and acks them."""

    def __init__(
        self,
        settings: ConsumerSettings,
        store: Store,
        thread: ThreadPoolExecutor,
        counters: Counters,
        mover: DeadLetters,
        spill: Spill,
    ) -> None:
        self._settings = settings
        self._store = store
        self._thread = thread
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._pending = Pending(settings.batch_max_rows, settings.prefetch_count, settings.flush_interval_ms / 1000)
        self._outgoing = Outgoing(mover, spill, self._in_thread, self._acknowledge, counters)
        self._link: Link | None = None
        self._consumer_tag = ""
        self._down = "not connected yet"  # the reason while there is no link; "" while there is
        self._trouble = ""  # the reason while batches cannot be stored
        self._stalled = ""  # the reason while waiting work makes no progress
        self._storing: tuple[int, float] | None = None  # messages in the batch being stored, and when the oldest came
        self._calls: dict[asyncio.Future[Any], float] = {}  # waiting for the store's thread, and since when
        self._delivered_at = self._loop.time()
        self._fruitless_looks = 0  # checks that found messages in the queue, since the last delivery
        self._wake = asyncio.Event()
        self._draining = False
        self._reopen_due = False
        self._rotation_failed = False

    @property
    def link(self) -> Link | None:
        """The link that delivers now."""
        return self._link

    # The link

    async def up(self, link: Link) -> None:
        """Set up a new connection: queues, prefetch, consume."""
        settings = self._settings
        await declare(link.channel, settings.queue_name, QUEUE_ARGUMENTS)
        await declare(link.channel, dead_letter_queue(settings.queue_name), DEAD_LETTER_ARGUMENTS)
        # RabbitMQ cuts a link that is not read for 30 s. During disk trouble a new link consumes nothing until it ends.
        while self._trouble and not self._draining:
            self._down = ""  # there is a link
            await asyncio.sleep(TROUBLE_POLL_SECONDS)
        if self._draining:
            return  # take nothing new; the link is only kept up
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await link.channel.basic_qos(prefetch_count=settings.prefetch_count)
            self._link, self._down = link, ""
            self._delivered_at = self._loop.time()
            self._consumer_tag = await consume(link.channel, settings.queue_name)
        if self._draining:  # it began during the call
            await link.channel.basic_cancel(self._consumer_tag, nowait=True)

    def down(self, reason: str) -> None:
        """Forget what is not stored yet, since it is delivered again. Acks for the lost link are void."""
        if self._link is not None:
            self._counters.metrics.values[self._counters.reconnects] += 1.0
        self._link, self._down = None, reason
        self._pending.clear()
        self._outgoing.forget()

    def deliveries(self, deliveries: list[Delivery]) -> None:
        values, counters, pending = self._counters.metrics.values, self._counters, self._pending
        values[counters.deliveries] += len(deliveries)
        if deliveries[0].redelivered or deliveries[-1].redelivered:
            values[counters.redeliveries] += sum(delivery.redelivered for delivery in deliveries)
        was_empty = not pending.deliveries
        self._delivered_at = self._loop.time()
        self._fruitless_looks = 0
        pending.add(deliveries, self._delivered_at)
        if was_empty or pending.full:
            self._wake.set()
        if pending.bytes > HELD_BACK_BYTES and self._link is not None:
            self._link.lane.hold_back(True)

    def confirms(self, confirms: list[Confirm]) -> None:
        """Ignore them: nothing is published on this connection."""

    def blocked(self, reason: str) -> None:
        """Ignore it: an alarm of the broker stops publishers only."""

    # The loop

    async def run(self) -> None:
        """Store batch after batch, until drained."""
        while await self._batch_is_due():
            link, since, deliveries = self._link, self._pending.since, self._pending.take()
            if link is not None and self._pending.bytes <= HELD_BACK_BYTES:
                link.lane.hold_back(False)
            self._storing = len(deliveries), since
            prepared, outcome = await self._in_thread(self._prepare_and_append, deliveries)
            if outcome is not None:
                await self._store_until_done(prepared, outcome)
            self._storing = None
            self._counters.metrics.values[self._counters.duplicates] += prepared.duplicates
            if link is self._link:  # else it is delivered again, and these tags mean other messages
                for each in prepared.poison:
                    log.warning("a message that is not an event goes to the dead letters: %s", each.reason)
                self._outgoing.take(prepared.poison)
                self._ack(link, prepared.stored)

    async def _batch_is_due(self) -> bool:
        """Wait for the next batch. Return False when drained."""
        while True:
            await self._between_batches()
            wait = self._pending.due_in(self._loop.time())
            if wait == 0.0 or (self._draining and wait is not None):
                return True
            if self._draining:
                return False
            await (self._wait(IDLE_SECONDS) if wait is None else self._gather(wait))

    async def _gather(self, seconds: float) -> None:
        """Let a batch grow. A trickle waits in the socket meanwhile, and is read at once: each read costs a wake-up."""
        link = self._link
        if link is None or self._pending.bytes > TRICKLE_BYTES or seconds > TRICKLE_SECONDS:
            await self._wait(seconds)
            return
        link.lane.hold_back(True)
        try:
            await self._wait(seconds)
        finally:
            link.lane.hold_back(False)
        await asyncio.sleep(0)  # the event loop reads

    async def _wait(self, seconds: float) -> None:
        """Wait until woken, for so long at most."""
        self._wake.clear()
        timer = self._loop.call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    async def _between_batches(self) -> None:
        """Do what must not happen while a batch is stored: rotate, reopen, put dead letters into their file."""
        settings, store = self._settings, self._store
        try:
            if 0 < settings.rotate_bytes <= store.committed_bytes or store.period_due(settings.rotate_interval):
                await self._in_thread(store.rotate)
            if self._reopen_due:
                self._reopen_due = False
                await self._in_thread(store.reopen)
            if self._outgoing.overdue():
                await self._outgoing.spill()
            self._rotation_failed = False
        except OSError as error:
            if not self._rotation_failed:
                log.error("cannot begin a new file: %s: %s; retrying", error.filename, error.strerror)
            self._rotation_failed = True

    def _prepare_and_append(self, deliveries: Sequence[Delivery]) -> tuple[Prepared, Timing | OSError | None]:
        """Prepare and append a batch, both in one call of the store's thread. None: there was nothing to append."""
        prepared = prepare_batch(deliveries, self._store.seen, self._settings.low_prob_threshold)
        return prepared, self._append(prepared) if prepared.ids or prepared.data else None

    def _append(self, prepared: Prepared) -> Timing | OSError:
        """Try to append a batch, in the store's thread."""
        try:
            return self._store.append(prepared.data, prepared.ids)
        except OSError as error:
            return error

    async def _store_until_done(self, prepared: Prepared, outcome: Timing | OSError) -> None:
        """Settle the first try to append a batch.

        In disk trouble (full, I/O error) wait and retry: nothing is acked before it is safe.
        """
        counters, delay = self._counters, RETRY_FIRST_SECONDS
        while isinstance(outcome, OSError):
            counters.metrics.values[counters.store_failures] += 1.0
            trouble = f"{outcome.filename}: {outcome.strerror}"
            if not self._trouble:
                log.error("cannot store: %s; nothing is acked, retrying", trouble)
            self._trouble = trouble
            await asyncio.sleep(delay)
            delay = min(2 * delay, RETRY_MOST_SECONDS)
            outcome = await self._in_thread(self._append, prepared)
        if self._trouble:
            log.info("storing again")
            self._trouble = ""
        self._pending.stored(sum(outcome))
        counters.metrics.values[counters.rows] += prepared.rows
        counters.batch_rows.observe(prepared.rows)
        counters.write_seconds.observe(outcome.write_seconds)
        counters.fsync_seconds.observe(outcome.fsync_seconds)
        counters.commit_seconds.observe(outcome.commit_seconds)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        future = self._loop.run_in_executor(self._thread, call, *args)
        self._calls[future] = self._loop.time()
        try:
            return await future
        finally:
            del self._calls[future]

    def _ack(self, link: Link | None, tags: Sequence[int]) -> None:
        """Ack on the link that delivered, if it is still the current one."""
        if link is not None and link is self._link and link.lane.lost is None:
            link.lane.send([ack_frames(ack_ranges(tags, self._outgoing.held))])

    def _acknowledge(self, tags: Sequence[int]) -> None:
        self._ack(self._link, tags)

    # Watching

    def not_ready(self) -> str:
        """Return why no event would reach the CSV now, or what needs an operator; "" when all is well."""
        if self._trouble:
            return f"cannot store: {self._trouble}"
        if self._stalled:
            return self._stalled
        return f"no broker: {self._down}" if self._down else self._outgoing.trouble()

    def tick(self) -> None:
        """Set the gauges, note a stall, and keep a held-back link alive. Call it once a second."""
        values, counters, now = self._counters.metrics.values, self._counters, self._loop.time()
        if self._link is not None:
            self._link.lane.keep_alive()
        self._note_stall(now)
        counters.metrics.settle()
        since = [now, self._pending.since]
        if self._outgoing.oldest_since is not None:
            since.append(self._outgoing.oldest_since)
        storing = 0
        if self._storing is not None:
            storing = self._storing[0]
            since.append(self._storing[1])
        values[counters.unacked] = len(self._pending.deliveries) + len(self._outgoing.held) + storing
        values[counters.oldest_unacked] = now - min(since)
        values[counters.csv_bytes] = self._store.committed_bytes
        values[counters.store_ok] = not self._trouble
        values[counters.connected] = not self._down
        values[counters.stalled] = bool(self._stalled)
        values[counters.spilled_bytes] = self._outgoing.spilled_bytes

    def _note_stall(self, now: float) -> None:
        stalled = ""
        silent_seconds = now - next(iter(self._calls.values()), now)
        if silent_seconds > STALL_SECONDS:
            stalled = f"stalled: the disk has not answered for {silent_seconds:.0f} s"
        elif self._fruitless_looks >= 2:
            stalled = f"stalled: messages wait in '{self._settings.queue_name}', and the broker delivers none"
        if stalled and not self._stalled:
            log.error("%s", stalled)
        elif self._stalled and not stalled:
            log.info("no longer stalled")
        self._stalled = stalled

    async def watch(self) -> None:
        """Check the queue when nothing was delivered for a while; if messages wait there twice, connect again.

        Possible causes are acks that the broker lost, a consumer that it forgot, or another active consumer of the
        queue. A new connection fixes the first two. With a second consumer it is not tried.
        """
        while True:
            await asyncio.sleep(STALL_SECONDS / 2)
            link, since = self._link, self._delivered_at
            if link is None or self._draining or self._pending.deliveries or self._storing is not None:
                continue
            if len(self._outgoing.held) >= self._settings.prefetch_count:
                continue  # the prefetch is used up; Outgoing reports it
            if self._loop.time() - since < STALL_SECONDS / 2:
                continue
            try:
                async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                    queue = await link.channel.queue_declare(self._settings.queue_name, passive=True)
            except asyncio.CancelledError:
                if cancelled():
                    raise
                continue
            except TimeoutError:
                link.lane.fail("the broker does not answer")
                continue
            except CONNECTION_ERRORS:
                continue  # the link is lost; keep_up reports it
            if link is not self._link or since != self._delivered_at:
                continue
            self._fruitless_looks = self._fruitless_looks + 1 if queue.message_count else 0
            if self._fruitless_looks >= 2 and (queue.consumer_count or 0) < 2:
                self._note_stall(self._loop.time())
                link.lane.fail("messages wait, and the broker delivers none")

    # The end

    def reopen(self) -> None:
        """Begin a new CSV before the next batch, after the current one was moved (by logrotate, for example)."""
        self._reopen_due = True
        self._wake.set()

    async def drain(self, running: asyncio.Task[None]) -> None:
        """Take no more deliveries; store and ack what is in memory, and dead-letter poison."""
        link, self._draining = self._link, True
        if link is not None and link.lane.lost is None:
            try:
                # nowait: the answer would come behind all deliveries in flight, and not at all while held back.
                async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                    await link.channel.basic_cancel(self._consumer_tag, nowait=True)
            except (Exception, asyncio.CancelledError) as error:
                if cancelled():
                    raise
                log.debug("while cancelling: %r", error)
        self._wake.set()
        await running
        await self._outgoing.settled()

    async def close(self) -> None:
        await self._outgoing.close()
