"""The consumer as a service, from one queue into one CSV: its parts built, started, drained and closed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from common.amqp.link import keep_up
from common.config import ConsumerSettings, read_again
from common.consumer.leftovers import Leftovers
from common.consumer.metrics import Counters
from common.consumer.worker import RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS, T, Worker
from common.errors import DiskTrouble, SettingError
from common.health import HEALTH_LIMITS, Health
from common.http.server import HttpServer
from common.process import end, first_of, read_file
from common.storage.lock import Lock
from common.storage.store import Store

log = logging.getLogger("predlog.consumer")

STANDBY_POLL_SECONDS = 0.25
TICK_SECONDS = 1.0


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
        self._leftovers = Leftovers(self._url, settings.queue_name, settings.partitions, base_queue_name)
        self._server = HttpServer(HEALTH_LIMITS, Health(self.not_ready, self.metrics))
        self._lock = Lock(settings.csv_file)
        self._thread = ThreadPoolExecutor(1, "store")
        self._stop = asyncio.Event()
        self._store: Store | None = None
        self._worker: Worker | None = None
        self._no_worker = "starting"  # the reason, while there is no worker
        self._tasks: list[asyncio.Task[None]] = []
        self.health_port = 0

    async def start(self) -> None:
        """Open the health port, and begin to consume, or to wait as a standby."""
        values, counters = self._counters.metrics.values, self._counters
        values[counters.start_time] = time.time()
        values[counters.store_ok] = 1.0  # a standby has no trouble
        if self._settings.health_port:
            self.health_port = await self._server.listen(self._settings.health_host, self._settings.health_port)
        self._read_secrets()  # a process that replaces another one has the settings of the first start
        self.running = self._task(self._run())

    async def drain(self) -> None:
        """Take nothing new; store and ack what is in memory, for at most SHUTDOWN_TIMEOUT_MS."""
        self._stop.set()
        await asyncio.wait([self.running], timeout=self._settings.shutdown_timeout_ms / 1000)
        if self._worker is None:
            return
        log.info("stopping")
        try:
            await asyncio.wait_for(self._worker.drain(), self._settings.shutdown_timeout_ms / 1000)
        except TimeoutError:
            log.warning("not everything could be stored in time; the broker keeps it")

    async def close(self) -> None:
        """End everything, drained or not."""
        self._stop.set()
        await end(*self._tasks)
        release = self._lock.release if self._store is None else self._store.close  # after what the thread still does
        await asyncio.get_running_loop().run_in_executor(self._thread, release)
        self._thread.shutdown(wait=False)
        self._server.abort()

    def reload(self) -> None:
        """Read the secrets again, and open the CSV again, after it was moved. A standby has none."""
        self._read_secrets()
        if self._worker is not None:
            self._worker.reopen()

    def _read_secrets(self) -> None:
        try:
            self._settings = read_again(self._settings, read_file)
        except SettingError as error:
            log.error("%s; the one before stays", error)

    def not_ready(self) -> str:
        """Return why no event would reach the CSV now; "" when it would. The text is valid Unicode, unlike a path."""
        worker = self._worker
        reason = self._no_worker if worker is None else worker.not_ready() or self._leftovers.reason
        return reason.encode("utf-8", "backslashreplace").decode()

    def metrics(self) -> bytes:
        """Return the metrics as text, with current gauges."""
        if self._worker is not None:
            self._worker.tick()
        return self._counters.metrics.render()

    async def _run(self) -> None:
        await first_of(self._stop, self._task(self._tick()), self._task(self._work()))

    async def _work(self) -> None:
        """Own the CSV, recover it, and consume until stopped."""
        if not await self._past_trouble(self._own):
            return
        self._store = await self._past_trouble(self._open)
        if self._store is None or self._stop.is_set():
            return
        self._worker = worker = Worker(self._settings, self._store, self._thread, self._counters)
        self._tasks.append(worker.running)
        self._counters.metrics.values[self._counters.active] = 1.0
        log.info("rows go to %s", self._settings.csv_file)
        link = keep_up(self._url, self._name, worker)
        watching = worker.watch(), self._leftovers.watch(worker.started)
        await first_of(self._stop, worker.running, self._task(link), *map(self._task, watching))

    def _url(self) -> str:
        return self._settings.amqp_url

    def _open(self) -> Awaitable[Store]:
        settings = self._settings
        return asyncio.get_running_loop().run_in_executor(
            self._thread,
            Store.open,
            settings.csv_file,
            settings.dedup_window,
            settings.prefetch_count,
            log,
            settings.rotate_gzip,
            self._lock,
            settings.rotate_keep,
        )

    async def _own(self) -> bool:
        """Wait as a standby until this process owns the CSV. Return False if stopped before."""
        loop, waiting = asyncio.get_running_loop(), False
        while not await loop.run_in_executor(self._thread, self._lock.acquire):
            self._no_worker = "standby: another consumer owns the CSV"
            if not waiting:
                log.info("standby: another consumer owns the CSV; taking over when it ends")
            waiting = True
            if await self._stopped_within(STANDBY_POLL_SECONDS):
                return False
        if waiting:
            log.info("taking over")
        return True

    async def _past_trouble(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Retry `call` through disk trouble; return its result, or None if stopped before."""
        delay, in_trouble = RETRY_FIRST_SECONDS, False
        while True:
            try:
                return await call()
            except DiskTrouble as error:
                if not in_trouble:
                    log.error("cannot store: %s; retrying", error)
                in_trouble = True
                self._no_worker = f"cannot store: {error}"
                self._counters.metrics.values[self._counters.store_ok] = 0.0
            if await self._stopped_within(delay):
                return None
            delay = min(2 * delay, RETRY_MOST_SECONDS)

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _tick(self) -> None:
        while True:
            if self._worker is not None:
                self._worker.tick()
            self._counters.metrics.values[self._counters.unserved] = self._leftovers.messages
            self._report(self.not_ready())
            await asyncio.sleep(TICK_SECONDS)

    def _task(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task
