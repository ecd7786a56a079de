"""The consumer as a service, from one queue into one CSV: its parts built, started, drained and closed."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.amqp.link import CALL_TIMEOUT_SECONDS, cancelled, keep_up
from common.config import ConsumerSettings, read_again
from common.consumer import leftovers
from common.consumer.metrics import Counters
from common.consumer.worker import RETRY_SECONDS, Worker
from common.errors import DiskTrouble, SettingError
from common.health import HEALTH_LIMITS, Health
from common.http.server import HttpServer
from common.process import end, first_of, on_stop, read_file
from common.storage.lock import Lock
from common.storage.store import Store

log = logging.getLogger("predlog.consumer")

STANDBY = "standby: another consumer owns the CSV"
TICK_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 60.0  # between two looks for messages that no consumer serves, while there are some


async def serve(make_service: Callable[[], ConsumerService], alive_fd: int | None = None) -> None:
    """Run one consumer until a signal, then drain."""
    stop = on_stop(alive_fd)
    service = make_service()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload)
    try:
        await service.start()
        await first_of(stop, service.running)
        await service.drain()
    finally:
        await service.close()
    log.info("stopped")


class ConsumerService:
    """One consumer. Call `start`, `drain` and `close`, each once. Its work, `running`, ends early only by an error.

    `name` is what the broker shows. `report` is called once a second with why the service is not ready, or "". With
    `base_queue_name`, the name without a partition's number, it also looks for messages left by another PARTITIONS.
    Everything that touches the disk runs in one thread, so that the health port answers when the disk does not.
    """

    def __init__(
        self,
        settings: ConsumerSettings,
        counters: Counters,
        name: str = "consumer",
        report: Callable[[str], None] = lambda reason: None,
        base_queue_name: str = "",
    ) -> None:
        self._settings = settings
        self._counters = counters
        self._name = name
        self._report = report
        self._base_queue_name = base_queue_name
        self._server = HttpServer(HEALTH_LIMITS, Health(self.not_ready, counters.metrics.render))
        self._lock = Lock(settings.csv_file)
        self._thread = ThreadPoolExecutor(1, "store")
        self._store: Store | None = None
        self._worker: Worker | None = None
        self._no_worker = "starting"  # the reason, while there is no worker
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the health port, and begin to consume, or to wait as a standby."""
        values, counters = self._counters.metrics.values, self._counters
        values[counters.start_time] = time.time()
        values[counters.store_ok] = 1.0  # a standby has no trouble
        if self._settings.health_port:
            await self._server.listen(self._settings.health_host, self._settings.health_port)
        self.reload()  # a process that replaces another one has the settings of the first start
        self.running = self._task(self._run())

    async def drain(self) -> None:
        """Take nothing new; store and ack what is in memory, for at most SHUTDOWN_TIMEOUT_MS."""
        if self._worker is None:
            return
        log.info("stopping")
        try:
            await asyncio.wait_for(self._worker.drain(), self._settings.shutdown_timeout_ms / 1000)
        except TimeoutError:
            log.warning("not everything could be stored in time; the broker keeps the rest")

    async def close(self) -> None:
        """End everything, drained or not."""
        await end(*self._tasks)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._release)  # after the call that still runs
        self._thread.shutdown(wait=False)
        self._server.abort()

    def reload(self) -> None:
        """Read the secrets again, and open the CSV again, after it was moved. A standby has none."""
        try:
            self._settings = read_again(self._settings, read_file)
        except SettingError as error:
            log.error("%s; the old secrets stay", error)
        if self._worker is not None:
            self._worker.reopen()

    def not_ready(self) -> str:
        """Return why no event would reach the CSV now; "" when it would. The text is valid Unicode, unlike a path."""
        reason = self._no_worker if self._worker is None else self._worker.not_ready()
        return reason.encode("utf-8", "backslashreplace").decode()

    async def _run(self) -> None:
        await asyncio.gather(self._task(self._tick()), self._task(self._work()))

    async def _work(self) -> None:
        """Own the CSV, recover it, and consume."""
        self._worker = worker = Worker(self._settings, await self._opened(), self._thread, self._counters)
        self._tasks.append(worker.running)
        self._counters.metrics.values[self._counters.active] = 1.0
        log.info("rows go to %s", self._settings.csv_file)
        link = keep_up(lambda: self._settings.amqp_url, self._name, worker)
        beside = link, worker.watch(), self._look_for_leftovers(worker.started)
        await asyncio.gather(worker.running, *map(self._task, beside))

    async def _opened(self) -> Store:
        """Wait as a standby until this process owns the CSV, and recover it. Retry through disk trouble."""
        loop, values, counters = asyncio.get_running_loop(), self._counters.metrics.values, self._counters
        owned = False
        while True:
            try:
                owned = owned or await loop.run_in_executor(self._thread, self._lock.acquire)
                if owned:
                    return await loop.run_in_executor(self._thread, self._open)
                if self._no_worker != STANDBY:
                    log.info("%s; taking over when it ends", STANDBY)
                self._no_worker = STANDBY
            except DiskTrouble as error:
                if values[counters.store_ok]:
                    log.error("cannot store: %s; retrying", error)
                values[counters.store_ok] = 0.0
                self._no_worker = f"cannot store: {error}"
            await asyncio.sleep(RETRY_SECONDS)

    def _open(self) -> Store:
        its = self._settings
        self._store = Store.open(
            *(its.csv_file, its.dedup_window, its.prefetch_count, log, its.rotate_gzip, self._lock, its.rotate_keep)
        )
        return self._store

    def _release(self) -> None:
        (self._lock.release if self._store is None else self._store.close)()

    async def _tick(self) -> None:
        while True:
            if self._worker is not None:
                self._worker.tick()
            self._report(self.not_ready())
            await asyncio.sleep(TICK_SECONDS)

    async def _look_for_leftovers(self, started: asyncio.Event) -> None:
        """Log which queues have messages that no consumer serves, and count them. Repeat while there are some."""
        its, found = self._settings, dict[str, int]()
        await started.wait()
        while True:
            before = found
            try:
                async with asyncio.timeout(3 * CALL_TIMEOUT_SECONDS):
                    url = self._settings.amqp_url
                    found = await leftovers.look(url, its.queue_name, its.partitions, self._base_queue_name)
            except (Exception, asyncio.CancelledError) as error:
                if cancelled():
                    raise
                log.debug("looking for messages that no consumer serves failed: %r", error)
            self._counters.metrics.values[self._counters.unserved] = sum(found.values())
            if not found:
                return
            if found.keys() != before.keys():
                queues = ", ".join(f"{messages} in '{name}'" for name, messages in found.items())
                log.warning(
                    "messages wait in queues that no consumer serves with PARTITIONS=%d: %s; see docs/scaling.md on "
                    "changing PARTITIONS; --replay-dead-letters empties a queue that ends in .dead",
                    its.partitions,
                    queues,
                )
            await asyncio.sleep(LOOK_AGAIN_SECONDS)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task
