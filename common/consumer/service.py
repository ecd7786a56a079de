"""The consumer as a service: its parts wired, started, drained and closed."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from common.amqp.link import keep_up
from common.config import ConsumerSettings
from common.consumer.health import HEALTH_LIMITS, Health
from common.consumer.metrics import Counters
from common.consumer.worker import RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS, STANDBY_POLL_SECONDS, Consumer, T
from common.errors import DiskTrouble
from common.http.server import HttpServer
from common.process import end, first_of, on_stop
from common.storage.lock import Lock
from common.storage.store import Store

log = logging.getLogger("predlog.consumer")
# A producer that reconnects publishes all that is unconfirmed (4,096 by default) again.
LEAST_DEDUP_WINDOW = 16_384


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


async def serve(settings: ConsumerSettings) -> None:
    """Run the consumer until a signal, then drain."""
    loop, stop = asyncio.get_running_loop(), on_stop()
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # a standby has no file to open again
    counters = Counters()
    counters.metrics.values[counters.start_time] = time.time()
    counters.metrics.values[counters.store_ok] = 1.0  # on standby nothing speaks against it
    health = Health(counters)
    server = HttpServer(HEALTH_LIMITS, health)
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
