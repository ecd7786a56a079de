"""The consumer's worker without a broker: what it stores, what it acks on which link, what it reports when stuck."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.config import ConsumerSettings
from common.consumer import prepare as prepare_module
from common.consumer import worker as worker_module
from common.consumer.metrics import Counters
from common.consumer.prepare import prepare_batch
from common.consumer.worker import Worker
from common.process import end
from common.storage.store import Store
from tests.support.deliveries import delivery, devices, event, event_line, group
from tests.support.lane import FakeLink
from tests.support.polling import until


class Bench:
    """A worker over a real store, and a way to hold up or fail its appends."""

    def __init__(self, folder: Path, thread: ThreadPoolExecutor, store: Store, settings: ConsumerSettings) -> None:
        self.csv_file = Path(settings.csv_file)
        self.dead_letters = Path(f"{settings.csv_file}.dead-letters")
        self.counters = Counters()
        self.store = store
        self.worker = Worker(settings, store, thread, self.counters)

    async def link(self) -> FakeLink:
        link = FakeLink()
        await self.worker.up(link.link)
        return link

    def devices(self) -> list[str]:
        return devices(self.csv_file)

    def letters(self) -> list[str]:
        """The body of each dead letter."""
        lines = self.dead_letters.read_bytes().splitlines() if self.dead_letters.exists() else []
        return [json.loads(line)["body"] for line in lines]

    def metric(self, index: int) -> float:
        self.worker.tick()
        return self.counters.metrics.values[index]

    @contextmanager
    def slow_appends(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        """Let appends wait, as on a disk that hangs, until the block ends. The event is set while one waits."""
        append, hangs, go_on = self.store.append, threading.Event(), threading.Event()

        def slow(*arguments: Any) -> Any:
            hangs.set()
            assert go_on.wait(20)
            return append(*arguments)

        monkeypatch.setattr(self.store, "append", slow)
        try:
            yield hangs
        finally:
            go_on.set()
            monkeypatch.undo()


MakeBench = Callable[..., Any]


@pytest.fixture
def bench(tmp_path: Path) -> MakeBench:
    """`async with bench(**settings) as b`"""

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[Bench]:
        csv_file = str(tmp_path / "data.csv")
        made = ConsumerSettings(amqp_url="amqp://127.0.0.1:1/", csv_file=csv_file, **settings)
        with ThreadPoolExecutor(1) as thread:
            store = thread.submit(Store.open, csv_file, 1000, 10, logging.getLogger("test")).result()
            b = Bench(tmp_path, thread, store, made)
            try:
                yield b
            finally:
                await end(b.worker.running)
                thread.submit(store.close).result()

    return make


async def test_a_batch_is_stored_and_acked_with_one_ack(bench: MakeBench) -> None:
    async with bench() as b:
        link = await b.link()
        assert link.channel.calls[-2:] == ["qos 500", "consume predictions"]
        b.worker.deliveries([delivery(1), delivery(2), delivery(3)])
        await until("it is acked", lambda: link.lane.acks)
        assert link.lane.acks == [(3, True)]
        assert b.devices() == ["device-1", "device-2", "device-3"]
        assert b.worker.not_ready() == ""


async def test_a_batch_of_a_lost_link_is_acked_on_no_link(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is lost while its batch is being stored. The messages come again, and are acked without a row."""
    async with bench() as b:
        first = await b.link()
        with b.slow_appends(monkeypatch) as hangs:
            b.worker.deliveries([delivery(1), delivery(2)])
            await until("the batch is being stored", hangs.is_set)
            b.worker.deliveries([delivery(3)])
            b.worker.down("cut by the test")
            assert "cut by the test" in b.worker.not_ready()
            second = await b.link()
        await until("it is stored", lambda: b.devices() == ["device-1", "device-2"])
        b.worker.deliveries([delivery(tag, redelivered=True) for tag in (1, 2, 3)])
        await until("all is acked", lambda: second.lane.acks)
        assert (first.lane.acks, second.lane.acks) == ([], [(3, True)])
        assert b.devices() == ["device-1", "device-2", "device-3"]
        assert b.metric(b.counters.duplicates) == 2
        assert b.metric(b.counters.reconnects) == 1


async def test_rows_that_are_too_large_together_are_stored_in_pieces(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event can have rows that are far larger than it. Each piece is acked once it is stored."""
    monkeypatch.setattr(prepare_module, "FULL_CHARS", 15_000)
    async with bench() as b:
        link = await b.link()
        b.worker.deliveries([delivery(tag, event(f"device-{tag}", "x" * 10_000)) for tag in range(1, 6)])
        await until("all is acked", lambda: link.lane.acks[-1:] == [(5, True)])
        assert link.lane.acks == [(2, True), (4, True), (5, True)]
        assert b.devices() == [f"device-{tag}" for tag in range(1, 6)]


async def test_nothing_is_acked_that_is_not_stored(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as b:
        link = await b.link()

        def fails(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "data.csv")

        monkeypatch.setattr(b.store, "append", fails)
        b.worker.deliveries([delivery(1)])
        await until("it is logged", lambda: "No space left" in b.worker.not_ready())
        assert link.lane.acks == []
        assert b.metric(b.counters.store_ok) == 0
        monkeypatch.undo()
        await until("it is acked", lambda: link.lane.acks == [(1, True)])
        assert b.devices() == ["device-1"]
        assert (b.worker.not_ready(), b.metric(b.counters.store_ok)) == ("", 1)


async def test_the_socket_is_not_read_while_too_much_waits(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "HELD_BACK_BYTES", 1000)
    async with bench() as b:
        link = await b.link()
        with b.slow_appends(pytest.MonkeyPatch()) as hangs:
            b.worker.deliveries([delivery(1)])
            await until("the batch is being stored", hangs.is_set)
            assert not link.lane.held_back
            b.worker.deliveries([delivery(2, event("device-2", "x" * 1000))])
            assert link.lane.held_back
            b.worker.tick()
            assert link.lane.kept_alive
        await until("all is stored", lambda: len(b.devices()) == 2)
        assert not link.lane.held_back


async def test_a_disk_that_hangs_is_reported(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "STALL_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    async with bench() as b:
        await b.link()
        with b.slow_appends(pytest.MonkeyPatch()):
            b.worker.deliveries([delivery(1)])
            await until("it is stalled", lambda: b.metric(b.counters.stalled) == 1)
            assert "the disk has not answered" in b.worker.not_ready()
            b.worker.tick()
        await until("it is no longer stalled", lambda: b.metric(b.counters.stalled) == 0)
        assert b.worker.not_ready() == ""
        assert [record.levelname for record in caplog.records if "stalled" in record.message] == ["ERROR", "INFO"]


@pytest.mark.parametrize(("consumers", "helps"), [(1, True), (2, False)])
async def test_a_queue_that_waits_without_deliveries_is_reported(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, consumers: int, helps: bool
) -> None:
    """It makes a new link, unless another consumer of the queue is the active one."""
    monkeypatch.setattr(worker_module, "STALL_SECONDS", 0.04)
    async with bench() as b:
        link = await b.link()
        watching = asyncio.create_task(b.worker.watch())
        await until("it has looked", lambda: link.channel.calls.count("declare predictions") > 2)
        assert (b.metric(b.counters.stalled), link.lane.lost) == (0, None)
        link.channel.waiting, link.channel.consumers = 7, consumers
        await until("it is stalled", lambda: b.metric(b.counters.stalled) == 1)
        assert "the broker delivers none" in b.worker.not_ready()
        assert (link.lane.lost is not None) is helps
        b.worker.deliveries([delivery(1)])
        assert b.metric(b.counters.stalled) == 0
        watching.cancel()


async def test_drain_stores_and_acks_what_is_here(bench: MakeBench) -> None:
    async with bench(flush_interval_ms=600_000) as b:
        b.worker._pending.stored(600.0)  # the disk is slow: the batch waits
        link = await b.link()
        b.worker.deliveries([delivery(1), delivery(2)])
        await b.worker.drain()
        b.worker.deliveries([delivery(3)])
        assert (b.devices(), link.lane.acks) == (["device-1", "device-2"], [(2, True)])
        assert b.metric(b.counters.unacked) == 0, "the broker keeps what comes later"
        again = await b.link()
        assert "consume predictions" not in again.channel.calls, "it takes nothing new while it drains"


# Dead letters


async def test_dead_letters_are_safe_before_the_one_ack(bench: MakeBench) -> None:
    async with bench() as b:
        link = await b.link()
        b.worker.deliveries([delivery(1), delivery(2, b"poison"), delivery(3)])
        await until("all is acked", lambda: link.lane.acks)
        assert link.lane.acks == [(3, True)]
        assert (b.devices(), b.letters()) == (["device-1", "device-3"], ["poison"])
        assert b.metric(b.counters.dead_letters["not_json"]) == 1


async def test_a_file_of_letters_that_fails_holds_the_batch(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as b:
        link = await b.link()
        b.dead_letters.mkdir()
        b.worker.deliveries([delivery(1), delivery(2, b"poison")])
        await until("it is logged", lambda: "dead-letters: is not a regular file" in b.worker.not_ready())
        assert (link.lane.acks, b.devices()) == ([], [])
        b.dead_letters.rmdir()
        await until("all is acked", lambda: link.lane.acks == [(2, True)])
        assert (b.devices(), b.letters()) == (["device-1"], ["poison"])


async def test_a_retry_for_rows_repeats_no_letter(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as b:
        link = await b.link()

        def fails(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "data.csv")

        monkeypatch.setattr(b.store, "append", fails)
        b.worker.deliveries([delivery(1), delivery(2, b"poison")])
        await until("it has tried twice", lambda: b.metric(b.counters.store_failures) >= 2)
        monkeypatch.undo()
        await until("all is acked", lambda: link.lane.acks == [(2, True)])
        assert b.letters() == ["poison"]
        assert b.metric(b.counters.dead_letters["not_json"]) == 1


async def test_letters_of_a_lost_link_are_acked_on_no_link(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come again, and are in the file twice, under one id."""
    async with bench() as b:
        first = await b.link()
        with b.slow_appends(monkeypatch) as hangs:
            b.worker.deliveries([delivery(1), delivery(2, b"poison")])
            await until("the batch is being stored", hangs.is_set)
            b.worker.down("cut by the test")
            second = await b.link()
        b.worker.deliveries([delivery(1, redelivered=True), delivery(2, b"poison", redelivered=True)])
        await until("all is acked", lambda: second.lane.acks == [(2, True)])
        assert (first.lane.acks, b.devices()) == ([], ["device-1"])
        assert len({json.loads(line)["id"] for line in b.dead_letters.read_bytes().splitlines()}) == 1


async def test_a_flood_of_letters_is_one_line_a_tick(bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    async with bench() as b:
        link = await b.link()
        for tag in range(1, 31):
            b.worker.deliveries([delivery(tag, b"poison")])
            await until("it is acked", lambda: len(link.lane.acks) == tag)  # noqa: B023
            if tag % 10 == 1:
                b.worker.tick()
        await b.worker.drain()
        said = [message for message in caplog.messages if "went to" in message]
        assert [int(line.split()[0]) for line in said] == [1, 10, 10, 9]
        assert all("JSON decode error" in line for line in said)


# Messages of several events


async def test_a_group_is_acked_once_all_its_lines_are_settled(bench: MakeBench) -> None:
    async with bench() as b:
        link = await b.link()
        known, fresh = event_line(f"{1:032x}", "known"), event_line(f"{2:032x}", "fresh")
        b.worker.deliveries([group(1, known)])
        await until("it is acked", lambda: link.lane.acks == [(1, True)])
        b.worker.deliveries([group(2, known, b"{bad", fresh, known)])
        await until("it is acked", lambda: len(link.lane.acks) == 2)
        assert (b.devices(), b.letters()) == (["known", "fresh"], ["{bad"])
        assert b.metric(b.counters.duplicates) == 2


async def test_the_window_holds_what_groups_can_bring_again(bench: MakeBench) -> None:
    """That is twice the prefetch, times the largest group so far. The journal keeps it over a restart."""
    async with bench(prefetch_count=100) as b:
        link = await b.link()
        b.worker.deliveries([group(1, *[event_line(f"{n:032x}") for n in range(64)])])
        await until("it is acked", lambda: link.lane.acks)
        assert b.store._journal.window == 2 * 100 * 64
        b.worker.deliveries([group(2, *[event_line(f"{n:032x}") for n in range(3000)])])
        await until("it is acked", lambda: len(link.lane.acks) == 2)
        assert b.store._journal.window == 2 * 100 * worker_module.MOST_EVENTS
    async with bench(prefetch_count=100) as b:
        assert b.store._journal.window == 2 * 100 * worker_module.MOST_EVENTS


async def test_ids_forgotten_too_soon_are_logged_once_an_hour(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(dedup_warn_seconds=60) as b:
        for seconds, lines in ((None, 0), (61.0, 0), (13.4, 1), (12.0, 1)):
            monkeypatch.setattr(b.store._journal, "window_seconds", seconds)
            b.worker.tick()
            said = [line for line in caplog.messages if "message ids are forgotten after 13 s" in line]
            assert len(said) == lines


# The disk's time


async def test_the_lateness_of_the_process_is_not_the_disks(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now))
    async with bench() as b:
        await b.link()
        with b.slow_appends(pytest.MonkeyPatch()) as hangs:
            b.worker.deliveries([delivery(1)])
            await until("the batch is being stored", hangs.is_set)
            now += 40.0  # frozen
            assert b.metric(b.counters.stalled) == 0
            for _ in range(11):
                assert b.metric(b.counters.stalled) == 0
                now += 1.0
            assert b.metric(b.counters.stalled) == 1
            assert "the disk has not answered for 11 s" in b.worker.not_ready()
        await until("it is no longer stalled", lambda: b.metric(b.counters.stalled) == 0)


async def test_time_to_decode_is_not_the_disks(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "STALL_SECONDS", 0.05)
    decodes, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        decodes.set()
        assert go_on.wait(20)
        return prepare_batch(*arguments)

    monkeypatch.setattr(worker_module, "prepare_batch", slow)
    async with bench() as b:
        link = await b.link()
        b.worker.deliveries([delivery(1)])
        await until("it decodes", decodes.is_set)
        for _ in range(10):
            await asyncio.sleep(0.02)
            assert b.metric(b.counters.stalled) == 0
        go_on.set()
        await until("it is acked", lambda: link.lane.acks)
