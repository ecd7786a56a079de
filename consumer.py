"""The consumer: predictions from RabbitMQ into CSV, each exactly once. Wires settings, broker, batch, store and acks.

The way of a message: FastLane.data_received → Consumer.on_deliveries → Pending (common/batch.py) → Consumer.run →
rows_of (decode, drop duplicates, encode) → Store.append (common/store.py: write, fsync, remember) → ack.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple, TypeVar

from common import __version__, batch, dead_letter_commands, dead_letters
from common.amqp.codec import Delivery, FrameError, ack_frame, ack_frames
from common.amqp.link import CLOSE_TIMEOUT_SECONDS, CONNECT_TIMEOUT_SECONDS, Link, cancelled, keep_up
from common.amqp.properties import message_id_of
from common.amqp.topology import DEAD_LETTER_ARGUMENTS, QUEUE_ARGUMENTS, dead_letter_queue, declare
from common.config import ConsumerSettings, describe, load, parser_for
from common.errors import DiskTrouble, Fatal, HttpError, InvalidEvent
from common.event.faults import describe_faults, is_not_json
from common.event.ids import id_digest
from common.event.rows import csv_rows
from common.http.parser import Head, Limits, Request
from common.http.server import Exchange, HttpServer, ServerLimits
from common.logs import set_up_logging
from common.metrics import BATCH_ROWS, LATENCY_SECONDS, Metrics
from common.metrics import CONTENT_TYPE as METRICS_TYPE
from common.process import end, fail, first_of, on_stop, run
from common.storage.lock import Lock
from common.storage.store import Store

log = logging.getLogger("predlog.consumer")

T = TypeVar("T")

HELD_BACK_BYTES = 64 * 1024 * 1024  # of deliveries in memory; beyond it the broker's socket is not read
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.1, 5.0
STANDBY_POLL_SECONDS = TROUBLE_POLL_SECONDS = 0.25
POISON_KINDS = ("not_json", "not_an_event")
IDLE_SECONDS = 1.0
# A producer that reconnects publishes all that is unconfirmed (4,096 by default) again.
LEAST_DEDUP_WINDOW = 16_384


class Poison(NamedTuple):
    """A message that can never become rows."""

    delivery: Delivery
    kind: str  # for metrics: one of POISON_KINDS
    reason: str  # for a person


class Prepared(NamedTuple):
    """A batch made ready for the store."""

    data: bytes  # whole CSV rows
    rows: int
    ids: list[bytes]  # of the messages in `data`, 16 bytes each
    stored: list[int]  # delivery tags to ack once `data` is safe, ascending; duplicates are among them
    duplicates: int
    poison: list[Poison]


def rows_of(deliveries: Sequence[Delivery], seen: Callable[[bytes], bool], low_prob_threshold: float) -> Prepared:
    """Decode a batch, drop what was stored already, encode the rest. A message gives all of its rows, or none."""
    texts, stored, poison, fresh = [], [], [], dict[bytes, None]()
    duplicates = rows = 0
    for delivery in deliveries:
        try:
            message_id = message_id_of(delivery.header)
            text, count = csv_rows(delivery.body, low_prob_threshold)
        except InvalidEvent as error:
            kind = "not_json" if is_not_json(error.faults) else "not_an_event"
            poison.append(Poison(delivery, kind, describe_faults(error.faults)))
            continue
        except FrameError as error:
            poison.append(Poison(delivery, "not_an_event", str(error)))
            continue
        if message_id is not None:
            digest = id_digest(message_id)
            if digest in fresh or seen(digest):
                duplicates += 1
                stored.append(delivery.delivery_tag)
                continue
            fresh[digest] = None
        texts.append(text)
        rows += count
        stored.append(delivery.delivery_tag)
    return Prepared("".join(texts).encode(), rows, list(fresh), stored, duplicates, poison)


class Counters:
    """The consumer's metrics."""

    def __init__(self) -> None:
        self.metrics = m = Metrics()
        self.deliveries = m.counter("predlog_deliveries_total", "Messages delivered by the broker.")
        self.redeliveries = m.counter(
            "predlog_redeliveries_total", "Messages delivered by the broker not for the first time."
        )
        self.duplicates = m.counter(
            "predlog_duplicates_total", "Messages dropped because their rows are in the CSV already."
        )
        self.dead_letters = {
            kind: m.counter("predlog_dead_letters_total", "Messages moved to the dead letters, by reason.", reason=kind)
            for kind in POISON_KINDS
        }
        self.rows = m.counter("predlog_rows_total", "Rows committed to the CSV.")
        self.batch_rows = m.histogram("predlog_batch_rows", "Rows in a batch.", BATCH_ROWS)
        self.write_seconds = m.histogram("predlog_write_seconds", "Writing a batch to the CSV.", LATENCY_SECONDS)
        self.fsync_seconds = m.histogram("predlog_fsync_seconds", "Syncing the CSV to the disk.", LATENCY_SECONDS)
        self.commit_seconds = m.histogram(
            "predlog_commit_seconds", "Committing a batch to the journal.", LATENCY_SECONDS
        )
        self.store_failures = m.counter("predlog_store_failures_total", "Attempts to store a batch that failed.")
        self.unacked = m.gauge("predlog_unacked", "Messages delivered and not yet acked.")
        self.oldest_unacked = m.gauge("predlog_oldest_unacked_seconds", "Age of the oldest unacked message.", max)
        self.csv_bytes = m.gauge("predlog_csv_bytes", "Committed size of the CSV.")
        self.store_ok = m.gauge("predlog_store_ok", "1 while batches can be stored.", min)
        self.active = m.gauge("predlog_active", "1 while this consumer owns the CSV, 0 on standby.")
        self.connected = m.gauge("predlog_amqp_connected", "1 while connected to the broker.", min)
        self.start_time = m.gauge("process_start_time_seconds", "Start of the process, Unix time.", max)
        self.reconnects = m.counter("predlog_amqp_reconnects_total", "Connections to the broker lost.")
        m.values[m.gauge("predlog_info", "Version and process.", max, version=__version__, process="consumer")] = 1.0


def build_metrics() -> Metrics:
    """All metrics of the consumer, at zero."""
    return Counters().metrics


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
        self._pending = batch.Pending(
            settings.batch_max_rows, settings.prefetch_count, settings.flush_interval_ms / 1000
        )
        self._link: Link | None = None
        self._consumer_tag = ""
        self._held: dict[int, float] = {}  # delivery tags on their way to the dead letters, and since when
        self._burials: set[asyncio.Task[None]] = set()
        self._dead_letters = dead_letters.DeadLetters(settings.amqp_url, settings.queue_name)
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
            prepared = await self._in_thread(rows_of, deliveries, self._store.seen, self._settings.low_prob_threshold)
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
            if batch.rotation_due(
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
            link.lane.send([ack_frames(batch.acks(tags, self._held))])

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


async def _owned(lock: Lock, stop: asyncio.Event) -> bool:
    """Wait as a standby until the CSV is ours; False if stopped before."""
    waiting = False
    while not lock.acquire():
        if not waiting:
            log.info("standby: another consumer owns the CSV; taking over when it ends")
        waiting = True
        try:
            await asyncio.wait_for(stop.wait(), STANDBY_POLL_SECONDS)
            return False
        except TimeoutError:
            pass
    if waiting:
        log.info("taking over")
    return True


async def _past_trouble(call: Callable[[], Awaitable[T]], health: Health, stop: asyncio.Event) -> T | None:
    """What `call` returns, once the disk is fit for it; None if stopped before."""
    delay, in_trouble = RETRY_FIRST_SECONDS, False
    while True:
        try:
            return await call()
        except DiskTrouble as error:
            if not in_trouble:
                log.error("cannot store: %s; trying on", error)
            in_trouble = True
            health.cannot_store(str(error))
        try:
            await asyncio.wait_for(stop.wait(), delay)
            return None
        except TimeoutError:
            delay = min(2 * delay, RETRY_MOST_SECONDS)


class Health:
    """The health port: /healthz, /readyz, /metrics."""

    def __init__(self, counters: Counters) -> None:
        self.consumer: Consumer | None = None
        self.no_consumer = "standby: another consumer owns the CSV"  # why there is none yet
        self._counters = counters

    def cannot_store(self, trouble: str) -> None:
        """Before there is a consumer, which tells its own troubles."""
        self.no_consumer = f"cannot store: {trouble}"
        self._counters.metrics.values[self._counters.store_ok] = 0.0

    def handle(self, request: Request, exchange: Exchange) -> None:
        self.check(request.head)
        path = request.head.path
        if path == b"/metrics":
            if self.consumer is not None:
                self.consumer.tick()
            exchange.answer(200, self._counters.metrics.render(), METRICS_TYPE)
            return
        if path == b"/readyz":
            reason = self.no_consumer if self.consumer is None else self.consumer.not_ready()
            if reason:
                raise HttpError(503, reason)
        exchange.answer(200, b'{"status":"alive"}' if path == b"/healthz" else b'{"status":"ready"}')

    def check(self, head: Head) -> None:
        if head.path not in (b"/healthz", b"/readyz", b"/metrics"):
            raise HttpError(404, "here are /healthz, /readyz and /metrics")
        if head.method not in (b"GET", b"HEAD"):
            raise HttpError(405, "this page takes GET, HEAD", (("Allow", "GET, HEAD"),))


_HEALTH_LIMITS = ServerLimits(Limits(body_bytes=1024), 100, 8, 2**20, 5.0, 5.0, 75.0, 5.0)


async def serve(settings: ConsumerSettings) -> None:
    """Run the consumer until a signal, then drain."""
    loop, stop = asyncio.get_running_loop(), on_stop()
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # a standby has no file to open again
    counters = Counters()
    counters.metrics.values[counters.start_time] = time.time()
    counters.metrics.values[counters.store_ok] = 1.0  # on standby nothing speaks against it
    health = Health(counters)
    server = HttpServer(_HEALTH_LIMITS, health.handle, health.check)
    if settings.health_port:
        await server.listen(settings.health_host, settings.health_port)
    lock = Lock(settings.csv_file)
    if not await _past_trouble(lambda: _owned(lock, stop), health, stop):
        return
    with ThreadPoolExecutor(1, "store") as thread:
        window = max(settings.dedup_window, LEAST_DEDUP_WINDOW)
        arguments = settings.csv_file, window, settings.prefetch_count, log, settings.rotate_gzip
        store = await _past_trouble(lambda: loop.run_in_executor(thread, Store.open, *arguments), health, stop)
        if store is None:
            return
        consumer = health.consumer = Consumer(settings, store, thread, counters)
        counters.metrics.values[counters.active] = 1.0
        loop.add_signal_handler(signal.SIGHUP, consumer.reopen)
        log.info("rows go to %s", settings.csv_file)

        async def tick() -> None:
            while True:
                consumer.tick()
                await asyncio.sleep(1.0)

        running = asyncio.create_task(consumer.run())
        ticker = asyncio.create_task(tick())
        link = asyncio.create_task(
            keep_up(settings.amqp_url, "consumer", consumer.prepare, consumer.on_down, consumer.on_trouble)
        )
        try:
            await first_of(stop, running, ticker, link)
            log.info("stopping")
            try:
                await asyncio.wait_for(consumer.drain(running), settings.shutdown_timeout_ms / 1000)
            except TimeoutError:
                log.warning("not everything could be stored in time; the broker keeps it")
        finally:
            await end(running, ticker, link)
            await consumer.close()
            await loop.run_in_executor(thread, store.close)
            server.abort()
            lock.release()
    log.info("stopped")


def main(argv: Sequence[str], environ: dict[str, str]) -> int:
    parser = parser_for(ConsumerSettings, "consumer.py", "Messages from RabbitMQ into CSV, each exactly once.")
    commands = parser.add_mutually_exclusive_group()
    commands.add_argument("--dead-letters", action="store_true", help="list the dead letters, and end")
    commands.add_argument("--replay-dead-letters", action="store_true", help="move the dead letters back, and end")
    commands.add_argument("--export-dead-letters", metavar="FILE", help="write the dead letters as JSON lines, and end")
    flags: argparse.Namespace = parser.parse_args(argv)
    try:
        settings = load(ConsumerSettings, flags, environ)
    except Fatal as error:
        return fail("consumer", error)
    set_up_logging("consumer", settings.log_level, settings.log_format)
    if flags.dead_letters:
        return run("consumer", lambda: dead_letter_commands.show(settings))
    if flags.replay_dead_letters:
        return run("consumer", lambda: dead_letter_commands.replay(settings))
    if flags.export_dead_letters is not None:
        return run("consumer", lambda: dead_letter_commands.export(settings, flags.export_dead_letters))
    log.info("predlog %s consumer: %s", __version__, describe(settings))
    return run("consumer", lambda: serve(settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
