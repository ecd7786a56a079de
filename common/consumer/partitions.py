"""The partitions that a consumer serves: the settings of each, a process for each, and a health port for all.

The processes share a Board, mapped before they are forked. Each has a row of metrics and a slot of text in it.
"""

from __future__ import annotations

import mmap
import os.path
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from common.amqp.topology import queue_names
from common.config import ConsumerSettings
from common.consumer.metrics import Counters
from common.consumer.service import ConsumerService, serve
from common.errors import SettingError
from common.health import HEALTH_LIMITS, Health
from common.http.server import HttpServer
from common.logs import set_up_logging
from common.metrics import Metrics
from common.process import on_stop, run
from common.workers import shared_rows, supervise

STALE_SECONDS = 5.0
_SLOT = struct.Struct("<d1016s")  # when (monotonic, the same clock for all processes), and why it is not ready
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


# Settings


def served(settings: ConsumerSettings) -> dict[int, ConsumerSettings]:
    """Return the settings of each partition that PARTITION names, by its number. Raise SettingError."""
    count, path = settings.partitions, settings.csv_file
    numbers = _numbers(settings.partition, count)
    if count == 1:
        return {0: settings}
    if os.path.basename(path) in ("", ".", "..") or os.path.normpath(path).startswith(("/dev/", "/proc/")):
        raise SettingError(f"CSV_FILE is {path!r}, but must name a file: each partition gets one like it")
    names = queue_names(settings.queue_name, count)
    return {n: replace(settings, queue_name=names[n], csv_file=csv_file(path, n)) for n in numbers}


def csv_file(path: str, number: int) -> str:
    """Return the CSV of a partition: data/data.2.csv for data/data.csv and 2."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}.{number}{suffix}"


def _numbers(text: str, count: int) -> list[int]:
    if not text:
        return list(range(count))
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise SettingError(f"PARTITION is {text!r}, but must be empty or like 2, 0-3 or 0,4")
        first = int(match[1])
        last = int(match[2] or first)
        if not first <= last < count:
            raise SettingError(f"PARTITION is {text!r}, but PARTITIONS={count} are numbered from 0 to {count - 1}")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


# Processes


class Board:
    """The memory through which the processes of `partitions` report to the one with the health port."""

    def __init__(self, partitions: Sequence[int]) -> None:
        self._partitions = partitions
        self._counters = counters = Counters()
        self.rows = shared_rows(len(partitions), counters.metrics.size)
        self._slots = mmap.mmap(-1, len(partitions) * _SLOT.size)
        self._by_partition = metrics = Metrics()
        kinds: tuple[tuple[Callable[..., int], str, str, int], ...] = (
            (metrics.counter, "rows_total", "Rows committed.", counters.rows),
            (metrics.gauge, "unacked", "Unacked messages.", counters.unacked),
            (metrics.gauge, "oldest_unacked_seconds", "Age of the oldest unacked message.", counters.oldest_unacked),
            (metrics.gauge, "csv_bytes", "Committed size of its CSV.", counters.csv_bytes),
            (metrics.gauge, "ready", "1 while it can continue.", -1),
        )
        self._shown: list[tuple[int, int, int]] = []  # where it is shown, index of the partition, place in its row
        for index, number in enumerate(partitions):
            self.report(index, "starting")
            for register, name, help, source in kinds:
                place = register(f"predlog_partition_{name}", help, partition=str(number))
                self._shown.append((place, index, source))

    def report(self, index: int, reason: str) -> None:
        """Note why the partition cannot continue, or "", with the time."""
        _SLOT.pack_into(self._slots, index * _SLOT.size, time.monotonic(), reason.encode("utf-8", "replace"))

    def not_ready(self) -> str:
        """Return each partition that cannot continue, and why; "" when all can."""
        reasons = [(number, self._reason(index)) for index, number in enumerate(self._partitions)]
        return "; ".join(f"partition {number}: {reason}" for number, reason in reasons if reason)

    def metrics(self) -> bytes:
        """Return the metrics of all partitions added up, and some of each."""
        for place, index, source in self._shown:
            value = self.rows[index][source] if source >= 0 else not self._reason(index)
            self._by_partition.values[place] = value
        return self._counters.metrics.render(self.rows) + self._by_partition.render()

    def _reason(self, index: int) -> str:
        when, text = _SLOT.unpack_from(self._slots, index * _SLOT.size)
        if (silent := time.monotonic() - when) > STALE_SECONDS:
            return f"its process has not answered for {silent:.0f} s"
        return str(text.rstrip(b"\0"), "utf-8", "replace")


def serve_all(settings: ConsumerSettings, partitions: Mapping[int, ConsumerSettings]) -> int:
    """Run one process for each partition until a signal; return the exit code."""
    if len({os.path.realpath(each.csv_file) for each in partitions.values()}) < len(partitions):
        raise SettingError("CSV_FILE: two partitions would write the same file through a link")
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
        base = "" if index else settings.queue_name  # only the first looks for what another PARTITIONS left behind
        report = partial(board.report, index)
        return run(prog, lambda: serve(lambda: ConsumerService(own, counters, prog, report, base), alive_fd))

    return supervise(len(numbers) + bool(settings.health_port), work, settings.shutdown_timeout_ms / 1000)


async def _serve_health(settings: ConsumerSettings, board: Board, alive_fd: int) -> None:
    """Serve the health port until a signal."""
    stop = on_stop(alive_fd)
    server = HttpServer(HEALTH_LIMITS, Health(board.not_ready, board.metrics))
    await server.listen(settings.health_host, settings.health_port)
    await stop.wait()
    server.abort()
