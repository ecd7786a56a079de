"""The consumer's loop: deliveries in, batches into the store, acks out.

The store has a thread of its own, one call at a time: prepare a batch, which reads the ids that the journal remembers;
append it, with its dead letters; rotate; reopen. The event loop owns everything else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import TypeVar

from common.amqp.codec import Delivery, ack_frame
from common.amqp.link import CALL_TIMEOUT_SECONDS, CONNECTION_ERRORS, Link, LinkListener, cancelled
from common.amqp.topology import QUEUE_ARGUMENTS, consume, declare
from common.config import ConsumerSettings
from common.consumer import dead_letters
from common.consumer.metrics import Counters
from common.consumer.pending import Pending
from common.consumer.prepare import Poison, Prepared, prepare_batch
from common.storage.store import Store, Timing

log = logging.getLogger("predlog.consumer")

T = TypeVar("T")

HELD_BACK_BYTES = 64 * 1024 * 1024  # of deliveries in memory; beyond it the broker's socket is not read
RETRY_SECONDS = 0.5  # in disk trouble
IDLE_SECONDS = 1.0
STALL_SECONDS = 10.0  # after this long without progress, waiting work is reported as stalled
LATE_SECONDS = 2.0  # after this long without a tick, this process itself was late
WINDOW_SECONDS = 3600.0  # between two log lines about ids that are forgotten too soon
MOST_EVENTS = 1000  # in one message; up to this, enough ids are remembered, whatever is delivered again


class Worker(LinkListener):
    """The listener of a link, and the loop that stores its deliveries batch by batch and acks them.

    Make it while the event loop runs. `running` is its loop as a task, which ends early only by an error.
    """

    def __init__(
        self, settings: ConsumerSettings, store: Store, thread: ThreadPoolExecutor, counters: Counters
    ) -> None:
        self.started = asyncio.Event()  # set once there was a link
        self._settings = settings
        self._store = store
        self._thread = thread
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        # The link
        self._link: Link | None = None
        self._delivered_at = 0.0
        self._fruitless_looks = 0  # that found messages in the queue, since the last delivery
        # The batches
        self._pending = Pending(settings.batch_max_rows, settings.prefetch_count, settings.flush_interval_ms / 1000)
        self._storing: tuple[int, float] = 0, inf  # messages in the batch being stored, and when the oldest came
        self._wake = asyncio.Event()
        self._draining = False
        self._reopen_due = False
        self._rotation_failed = False
        # Of the store's thread
        self._prepared: Prepared | None = None  # the batch being stored
        self._unsaved: list[Poison] = []  # of that batch
        self._disk_since = inf  # when the disk began the present step
        # Why it is not ready; "" while all is well
        self._down = "not connected yet"
        self._trouble = ""
        self._stalled = ""
        # Of the ticks
        self._ticked_at = self._on_time_since = time.monotonic()
        self._letters, self._last_why = 0, ""  # that the log has not mentioned
        self._window_line_at = -inf
        self.running = asyncio.create_task(self._run())

    # The link

    async def up(self, link: Link) -> None:
        """Set up a new connection: queue, prefetch, consume."""
        settings = self._settings
        await declare(link.channel, settings.queue_name, QUEUE_ARGUMENTS)
        # RabbitMQ cuts a link that is not read for 30 s. During disk trouble a new link consumes nothing until it ends.
        while self._trouble and not self._draining:
            self._down = ""  # there is a link
            await asyncio.sleep(RETRY_SECONDS)
        if self._draining:
            return  # take nothing new; the link is only kept up
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await link.channel.basic_qos(prefetch_count=settings.prefetch_count)
            self._link, self._down = link, ""
            self.started.set()
            self._delivered_at = self._loop.time()
            await consume(link.channel, settings.queue_name)

    def down(self, reason: str) -> None:
        """Forget what is not stored yet, since it is delivered again. Acks for the lost link are void."""
        if self._link is not None:
            self._counters.metrics.values[self._counters.reconnects] += 1.0
        self._link, self._down = None, reason
        self._pending.clear()

    def deliveries(self, deliveries: list[Delivery]) -> None:
        """Let them wait for the next batch. What comes during a drain stays unacked: the broker keeps it."""
        if self._draining:
            return
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

    # The loop

    async def _run(self) -> None:
        """Store batch after batch, until drained."""
        while await self._batch_is_due():
            link, since, deliveries = self._link, self._pending.since, self._pending.take()
            if link is not None and self._pending.bytes <= HELD_BACK_BYTES:
                link.lane.hold_back(False)
            while deliveries:
                self._storing = len(deliveries), since
                stored = await self._store_batch(deliveries)
                self._ack(link, deliveries[stored - 1].delivery_tag)
                del deliveries[:stored]
            self._storing = 0, inf

    def _ack(self, link: Link | None, delivery_tag: int) -> None:
        """Ack all up to `delivery_tag`, unless the link is lost: then all is delivered again, under other tags."""
        if link is not None and link is self._link and link.lane.lost is None:
            link.lane.send([ack_frame(delivery_tag, multiple=True)])

    async def _batch_is_due(self) -> bool:
        """Wait for the next batch. Return False when drained."""
        while True:
            await self._between_batches()
            wait = self._pending.due_in(self._loop.time())
            if wait == 0.0 or self._draining:
                return wait is not None
            self._wake.clear()
            timer = self._loop.call_later(IDLE_SECONDS if wait is None else wait, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def _between_batches(self) -> None:
        """Do what must not happen while a batch is stored: rotate, reopen."""
        settings, store = self._settings, self._store
        try:
            if 0 < settings.rotate_bytes <= store.committed_bytes or store.period_due(settings.rotate_interval):
                await self._in_thread(self._on_disk, store.rotate)
            if self._reopen_due:
                self._reopen_due = False
                await self._in_thread(self._on_disk, store.reopen)
            self._rotation_failed = False
        except OSError as error:
            if not self._rotation_failed:
                log.error("cannot begin a new file: %s: %s; retrying", error.filename, error.strerror)
            self._rotation_failed = True

    async def _store_batch(self, deliveries: Sequence[Delivery]) -> int:
        """Store the first of `deliveries`; return how many. In disk trouble (full, I/O error), retry."""
        values, counters = self._counters.metrics.values, self._counters
        while True:
            try:
                prepared, timing = await self._in_thread(self._prepare_and_append, deliveries)
                break
            except OSError as error:
                values[counters.store_failures] += 1.0
                trouble = f"{error.filename}: {error.strerror}"
                if not self._trouble:
                    log.error("cannot store: %s; nothing is acked, retrying", trouble)
                self._trouble = trouble
            await asyncio.sleep(RETRY_SECONDS)
        if self._trouble:
            log.info("storing again")
            self._trouble = ""
        values[counters.duplicates] += prepared.duplicates
        for each in prepared.poison:
            values[counters.dead_letters[each.kind]] += 1.0
            self._letters, self._last_why = self._letters + 1, each.why
        if timing is not None:
            self._pending.stored(sum(timing))
            values[counters.rows] += prepared.rows
            counters.batch_rows.observe(prepared.rows)
            counters.write_seconds.observe(timing.write_seconds)
            counters.fsync_seconds.observe(timing.fsync_seconds)
            counters.commit_seconds.observe(timing.commit_seconds)
        return prepared.messages

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        return await self._loop.run_in_executor(self._thread, call, *args)

    # In the store's thread

    def _prepare_and_append(self, deliveries: Sequence[Delivery]) -> tuple[Prepared, Timing | None]:
        """Make a batch durable, dead letters first. After an OSError, continue where it stopped. No rows, no Timing."""
        store, batch = self._store, self._prepared
        if batch is None:
            batch = self._prepared = prepare_batch(deliveries, store.seen, self._settings.low_prob_threshold)
            self._unsaved = batch.poison
            store.expect_again(self._settings.prefetch_count * min(batch.most_events, MOST_EVENTS))
        if self._unsaved:
            self._on_disk(lambda: dead_letters.append(store.path, self._unsaved))
            self._unsaved = []
        has_rows = batch.ids or batch.data
        timing = self._on_disk(lambda: store.append(batch.data, batch.ids)) if has_rows else None
        self._prepared = None
        return batch, timing

    def _on_disk(self, call: Callable[[], T]) -> T:
        self._disk_since = time.monotonic()
        try:
            return call()
        finally:
            self._disk_since = inf

    # Watching

    def not_ready(self) -> str:
        """Return why no event would reach the CSV now, or what needs an operator; "" when all is well."""
        if self._trouble:
            return f"cannot store: {self._trouble}"
        return self._stalled or (self._down and f"no broker: {self._down}")

    def tick(self) -> None:
        """Set the gauges, log what is due, and keep a held-back link alive. Call it once a second."""
        values, counters, now = self._counters.metrics.values, self._counters, self._loop.time()
        if self._link is not None:
            self._link.lane.keep_alive()
        self._note_stall()
        self._log_what_is_due(now)
        counters.metrics.settle()
        storing, storing_since = self._storing
        values[counters.unacked] = len(self._pending.deliveries) + storing
        values[counters.oldest_unacked] = now - min(now, self._pending.since, storing_since)
        values[counters.csv_bytes] = self._store.committed_bytes
        values[counters.store_ok] = not self._trouble
        values[counters.connected] = not self._down
        values[counters.stalled] = bool(self._stalled)

    def _log_what_is_due(self, now: float) -> None:
        """Log how many dead letters there were since the last call; warn hourly if ids leave the window too soon."""
        if self._letters:
            path = dead_letters.file_of(self._store.path)
            log.warning("%d dead letter(s) went to %s; the last: %s", self._letters, path, self._last_why)
            self._letters = 0
        seconds = self._store.window_seconds
        if seconds is not None and seconds < self._settings.dedup_warn_seconds and now >= self._window_line_at:
            log.warning(
                "message ids are forgotten after %.0f s: a client's retry that comes later makes a second row; "
                "raise DEDUP_WINDOW",
                seconds,
            )
            self._window_line_at = now + WINDOW_SECONDS

    def _note_stall(self) -> None:
        now, stalled = time.monotonic(), ""
        if now - self._ticked_at > LATE_SECONDS:  # this process did not run, so it cannot say how long the disk took
            self._on_time_since = now
        self._ticked_at = now
        disk_seconds = now - max(self._disk_since, self._on_time_since)
        if disk_seconds > STALL_SECONDS:
            stalled = f"stalled: the disk has not answered for {disk_seconds:.0f} s"
        elif self._fruitless_looks >= 2:
            stalled = (
                f"stalled: messages wait in '{self._settings.queue_name}', and the broker delivers none; if a node is "
                "lost, see consumer_disconnected_timeout in docs/operations.md"
            )
        if stalled and not self._stalled:
            log.error("%s", stalled)
        elif self._stalled and not stalled:
            log.info("no longer stalled")
        self._stalled = stalled

    async def watch(self) -> None:
        """Look at the size of the dead letters, and at the queue when nothing was delivered for a while.

        If messages wait at two looks in a row, connect again, which helps if the broker lost acks or forgot this
        consumer. If there is another consumer, that is the active one, and connecting again would not help.
        """
        while True:
            letters_bytes = await self._in_thread(dead_letters.size_of, self._store.path)
            self._counters.metrics.values[self._counters.dead_letters_bytes] = letters_bytes
            await asyncio.sleep(STALL_SECONDS / 2)
            link, since = self._link, self._delivered_at
            is_busy = self._draining or self._pending.deliveries or self._storing[0]
            if link is None or is_busy or self._loop.time() - since < STALL_SECONDS / 2:
                continue
            try:
                async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                    queue = await link.channel.queue_declare(self._settings.queue_name, passive=True)
            except (*CONNECTION_ERRORS, asyncio.CancelledError):  # aiormq can report a loss as that, too
                if cancelled():
                    raise
                link.lane.fail("the broker does not answer")
                continue
            if link is not self._link or since != self._delivered_at:
                continue
            self._fruitless_looks = self._fruitless_looks + 1 if queue.message_count else 0
            if self._fruitless_looks >= 2 and (queue.consumer_count or 0) < 2:
                link.lane.fail("messages wait, and the broker delivers none")

    # The end

    def reopen(self) -> None:
        """Begin a new CSV before the next batch, after the current one was moved (by logrotate, for example)."""
        self._reopen_due = True
        self._wake.set()

    async def drain(self) -> None:
        """Take no more deliveries; store and ack what is in memory."""
        self._draining = True
        self._wake.set()
        await self.running
        self._log_what_is_due(self._loop.time())
