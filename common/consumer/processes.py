"""One process for each partition under a supervisor, and one for the health port of all.

They share a Board, memory that is mapped before they are forked. Each has a row of metrics and a slot of text in it.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from common.config import ConsumerSettings
from common.consumer.metrics import Counters
from common.consumer.service import ConsumerService
from common.errors import SettingError
from common.health import HEALTH_LIMITS, Health
from common.http.server import HttpServer
from common.logs import set_up_logging
from common.metrics import Metrics
from common.process import first_of, on_stop, run
from common.workers import shared_rows, supervise

log = logging.getLogger("predlog.consumer")

STALE_SECONDS = 5.0
_SLOT = struct.Struct("<dH1014s")  # when (monotonic, the same clock for all processes), length, why it is not ready


class Board:
    """The memory through which the processes of `partitions` report to the one with the health port."""

    def __init__(self, partitions: Sequence[int]) -> None:
        self._partitions = partitions
        self._counters = Counters()
        self.rows = shared_rows(len(partitions), self._counters.metrics.size)
        self._slots = mmap.mmap(-1, len(partitions) * _SLOT.size)
        for index in range(len(partitions)):
            self.report(index, "starting")
        self._by_partition = metrics = Metrics()
        counters, self._shown = self._counters, list[tuple[int, int, int]]()
        for index, number in enumerate(partitions):
            label = str(number)
            for place, source in (
                (metrics.counter("predlog_partition_rows_total", "Rows committed.", partition=label), counters.rows),
                (metrics.gauge("predlog_partition_unacked", "Messages unacked.", partition=label), counters.unacked),
                (
                    metrics.gauge(
                        "predlog_partition_oldest_unacked_seconds", "Age of the oldest of them.", partition=label
                    ),
                    counters.oldest_unacked,
                ),
                (metrics.gauge("predlog_partition_csv_bytes", "Size of its CSV.", partition=label), counters.csv_bytes),
                (metrics.gauge("predlog_partition_ready", "1 while it can continue.", partition=label), -1),
            ):
                self._shown.append((place, index, source))

    def report(self, index: int, reason: str) -> None:
        """Note why the partition cannot continue, or "", with the time."""
        text = reason.encode("utf-8", "replace")[:1014]
        _SLOT.pack_into(self._slots, index * _SLOT.size, time.monotonic(), len(text), text)

    def not_ready(self) -> str:
        """Return each partition that cannot continue, and why; "" when all can."""
        reasons = [(number, self._reason(index)) for index, number in enumerate(self._partitions)]
        return "; ".join(f"partition {number}: {reason}" for number, reason in reasons if reason)

    def metrics(self) -> bytes:
        """Return the metrics of all partitions added up, and some of each."""
        for place, index, source in self._shown:
            value = self.rows[index][source] if source >= 0 else float(not self._reason(index))
            self._by_partition.values[place] = value
        return self._counters.metrics.render(self.rows) + self._by_partition.render()

    def _reason(self, index: int) -> str:
        when, length, text = _SLOT.unpack_from(self._slots, index * _SLOT.size)
        if (silent := time.monotonic() - when) > STALE_SECONDS:
            return f"its process has not answered for {silent:.0f} s"
        return str(text[:length], "utf-8", "replace")


async def serve(
    settings: ConsumerSettings,
    counters: Counters,
    name: str = "consumer",
    report: Callable[[str], None] = lambda reason: None,
    alive_fd: int | None = None,
    base_queue_name: str = "",
) -> None:
    """Run one consumer until a signal, then drain."""
    stop = on_stop(alive_fd)
    service = ConsumerService(settings, counters, name, report, base_queue_name)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload)
    try:
        await service.start()
        await first_of(stop, service.running)
        await service.drain()
    finally:
        await service.close()
    log.info("stopped")


def serve_all(settings: ConsumerSettings, partitions: Mapping[int, ConsumerSettings]) -> int:
    """Run one process for each partition until a signal; return the exit code."""
    by_file: dict[str, int] = {}
    for number, each in partitions.items():
        other = by_file.setdefault(os.path.realpath(each.csv_file), number)
        if other != number:
            raise SettingError(f"CSV_FILE: partitions {other} and {number} would write the same file, {each.csv_file}")
    numbers = list(partitions)
    board = Board(numbers)

    def work(index: int, alive_fd: int, replaces: bool) -> int:
        if index == len(numbers):
            set_up_logging("consumer-health", settings.log_level, settings.log_format)
            return run("consumer", lambda: _serve_health(settings, board, alive_fd))
        number, prog = numbers[index], f"consumer-{numbers[index]}"
        counters = Counters()
        counters.metrics.bind(board.rows[index])
        set_up_logging(prog, settings.log_level, settings.log_format)
        own = replace(partitions[number], health_port=0)
        report, base = (lambda reason: board.report(index, reason)), "" if index else settings.queue_name
        return run(prog, lambda: serve(own, counters, prog, report, alive_fd, base))

    return supervise(len(numbers) + bool(settings.health_port), work, settings.shutdown_timeout_ms / 1000)


async def _serve_health(settings: ConsumerSettings, board: Board, alive_fd: int) -> None:
    """Serve the health port until a signal."""
    stop = on_stop(alive_fd)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    server = HttpServer(HEALTH_LIMITS, Health(board.not_ready, board.metrics))
    await server.listen(settings.health_host, settings.health_port)
    await stop.wait()
    server.abort()
