"""consumer.py with a fault: it kills itself at one exact moment, or one of its safety steps is taken out.

It is only for tests, and only this wrapper reads these variables:
CHAOS_FAULT=POINT:N   SIGKILL to itself at the N-th passage of a point below, counted from its start
CHAOS_FAULT=POINT:N:power   the same, and what was not synced is gone from CSV and journal, as after a power cut
CHAOS_MUTATION=NAME   a step of the promise is missing
CHAOS_CLOCK=SECONDS,…   the wall clock is off by each of these for a second, in turn, again and again
CHAOS_FLOCK=off   flock has no effect, as on some network file systems
"""

import asyncio
import fcntl
import gzip
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

import consumer
from common.consumer import prepare
from common.consumer.worker import Worker
from common.storage import journal, rotation, store
from common.storage.csv_file import CsvFile
from common.storage.journal import Journal
from common.storage.recovery import FileState
from common.storage.repair import adopt
from common.storage.store import Store

Strike = Callable[..., None]
Arm = Callable[[Strike], None]

_synced_bytes: dict[tuple[int, int], int] = {}  # of CSV and journal files, by device and inode


def _before(owner: Any, name: str) -> Arm:
    def arm(strike: Strike) -> None:
        real = getattr(owner, name)

        def patched(*arguments: Any) -> Any:
            strike()
            return real(*arguments)

        setattr(owner, name, patched)

    return arm


def _after(owner: Any, name: str) -> Arm:
    def arm(strike: Strike) -> None:
        real = getattr(owner, name)

        def patched(*arguments: Any) -> Any:
            result = real(*arguments)
            strike()
            return result

        setattr(owner, name, patched)

    return arm


def _in_the_middle_of(owner: Any, name: str) -> Arm:
    """Kill in the middle of a write, whose last argument is the bytes; never between two lines."""

    def arm(strike: Strike) -> None:
        real = getattr(owner, name)

        def patched(target: Any, data: bytes) -> Any:
            strike(lambda: real(target, data[: len(data) // 2].removesuffix(b"\n")))
            return real(target, data)

        setattr(owner, name, patched)

    return arm


STORING: dict[str, Arm] = {
    "before-write": _before(CsvFile, "write"),
    "in-write": _in_the_middle_of(CsvFile, "write"),
    "write-to-fsync": _after(CsvFile, "write"),
    "fsync-to-commit": _after(CsvFile, "sync"),
    "in-commit": _in_the_middle_of(journal, "write_all"),
    "commit-to-ack": _after(Journal, "commit"),
    "after-ack": _after(Worker, "_ack"),
}
"""The points that every batch passes."""

RECOVERING: dict[str, Arm] = {
    "journal-read": _after(Journal, "load"),
    "aside-to-cut": _before(CsvFile, "cut"),
    "cut-to-commit": _after(CsvFile, "set_aside"),
    "recovery-to-commit": _before(Journal, "commit"),
    "recovery-in-commit": _in_the_middle_of(journal, "write_all"),
    "recovered": _after(Journal, "commit"),
}
"""The points that a start passes (two of them only after a crash with rows that were not committed)."""

ROTATING: dict[str, Arm] = {
    "renamed-to-new-file": _before(Store, "_start_file"),
    "new-file-to-commit": _after(store, "adopt"),
    "new-file-commit": _after(Store, "_start_file"),
    "in-gzip": _before(gzip.GzipFile, "write"),
    "gzip-to-unlink": _after(rotation, "sync_directory"),
}
"""The points that a rotation passes (a start also passes one of them)."""

POINTS = STORING | RECOVERING | ROTATING


def _ack_before_fsync() -> None:
    async def run(self: Worker) -> None:
        while await self._batch_is_due():
            link, deliveries = self._link, self._pending.take()
            self._ack(link, deliveries[-1].delivery_tag)
            await asyncio.sleep(0.2)  # the broker has it now
            await self._store_batch(deliveries)

    Worker._run = run  # type: ignore[method-assign]


def _line_unsettled() -> None:
    """Of a message with several events, the last one is acked without a row."""
    _change_lines(lambda items: items[:-1] if len(items) > 1 else items)


def _id_forgotten() -> None:
    """Of a message with several events, the last id is not remembered."""
    _change_lines(lambda items: [*items[:-1], (*items[-1][:2], None)] if len(items) > 1 else items)


def _change_lines(change: Callable[[list[prepare.Item]], list[prepare.Item]]) -> None:
    real = prepare.ndjson_items
    prepare.ndjson_items = lambda body: iter(change(list(real(body))))


def _no_fsync() -> None:
    CsvFile.sync = lambda self: None  # type: ignore[method-assign]


def _no_dedup() -> None:
    Store.seen = lambda self, id: False  # type: ignore[method-assign]


def _no_cut() -> None:
    def apply(plan: object, file: CsvFile, journal: Journal, notes: list[str]) -> FileState:
        return adopt(file, notes)

    CsvFile.rows_end = lambda self, start=0: self.size()  # type: ignore[method-assign]
    store.apply = apply  # type: ignore[attr-defined]


MUTATIONS: dict[str, Callable[[], None]] = {
    "ack-before-fsync": _ack_before_fsync,
    "no-fsync": _no_fsync,
    "no-dedup": _no_dedup,
    "no-cut": _no_cut,
    "line-unsettled": _line_unsettled,
    "id-forgotten": _id_forgotten,
}


def _arm(fault: str) -> None:
    point, passage, *power = fault.split(":")
    left = int(passage)
    if power:
        _watch_syncs()

    def strike(last_act: Callable[[], object] | None = None) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if last_act is not None:
                last_act()
            if power:
                _lose_what_is_not_synced()
            os.kill(os.getpid(), signal.SIGKILL)

    POINTS[point](strike)


def _watch_syncs() -> None:
    fsync, open_csv = os.fsync, CsvFile.__init__

    def watched_fsync(fd: int) -> None:
        fsync(fd)
        _note_size(fd)

    def watched_open(self: CsvFile, path: str, mode: int | None = None) -> None:
        open_csv(self, path, mode)
        _note_size(self._fd)

    os.fsync = watched_fsync  # type: ignore[assignment]
    CsvFile.__init__ = watched_open  # type: ignore[method-assign]


def _note_size(fd: int) -> None:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        _synced_bytes[status.st_dev, status.st_ino] = status.st_size


def _lose_what_is_not_synced() -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            size = _synced_bytes.get((status.st_dev, status.st_ino))
            if size is not None and size < status.st_size:
                os.ftruncate(int(name), size)
        except OSError:  # the descriptor of the listing itself; one opened for reading
            pass


def _shift_clock(offsets: list[float]) -> None:
    """Shift only the time that our code asks for: names of files and log lines have the true time."""
    real, began = time.time, time.monotonic()

    def shifted() -> float:
        return real() + offsets[int(time.monotonic() - began) % len(offsets)]

    time.time = shifted
    time.time_ns = lambda: int(shifted() * 1e9)


if __name__ == "__main__":
    if clock := os.environ.get("CHAOS_CLOCK"):
        _shift_clock([float(seconds) for seconds in clock.split(",")])
    if os.environ.get("CHAOS_FLOCK") == "off":
        fcntl.flock = lambda fd, operation: None
    if mutation := os.environ.get("CHAOS_MUTATION"):
        MUTATIONS[mutation]()
    if fault := os.environ.get("CHAOS_FAULT"):
        _arm(fault)
    sys.exit(consumer.main(sys.argv[1:], dict(os.environ)))
