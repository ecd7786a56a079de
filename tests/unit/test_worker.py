"""The consumer's worker without a broker: what is stored, what is acked on which link, and what it says when stuck."""

from __future__ import annotations

import asyncio
import csv
import errno
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from common.amqp.codec import Delivery
from common.config import ConsumerSettings
from common.consumer import worker as worker_module
from common.consumer.dead_letters import outgoing, spill
from common.consumer.dead_letters.mover import DeadLetters
from common.consumer.dead_letters.spill import Spill
from common.consumer.metrics import Counters
from common.consumer.worker import Worker
from common.storage.store import Store
from tests.support.lane import FakeLink
from tests.support.polling import until

NO_PROPERTIES = b"\x00\x3c\x00\x00" + bytes(8) + b"\x00\x00"


def with_id(message_id: bytes) -> bytes:
    return b"\x00\x3c\x00\x00" + bytes(8) + b"\x00\x80" + bytes([len(message_id)]) + message_id


def event(device: str, frame: str = "frame") -> bytes:
    preds = [{"image_frame": frame, "prob": 0.5, "tags": ["cat"]}]
    document = {"device_id": device, "client_id": "c", "created_at": "t", "data": {"license_id": "l", "preds": preds}}
    return json.dumps(document).encode()


def delivery(tag: int, body: bytes = b"", redelivered: bool = False) -> Delivery:
    """Of an event of its own, whose id is the device's."""
    device = f"device-{tag}"
    return Delivery(tag, redelivered, with_id(device.encode()), body or event(device))


class StuckMover:
    """A mover that confirms nothing until `open` is set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.moved: list[bytes] = []

    async def move(self, delivery: Delivery, reason: str) -> None:
        await self.open.wait()
        self.moved.append(delivery.body)

    async def close(self) -> None: ...


class Bench:
    """A worker over a real store, and a way to hold up or fail its appends."""

    def __init__(self, folder: Path, thread: ThreadPoolExecutor, store: Store, settings: ConsumerSettings) -> None:
        self.csv_file = Path(settings.csv_file)
        self.mover = StuckMover()
        self.spill = Spill(f"{settings.csv_file}.dead-letters")
        self.counters = Counters()
        self.store = store
        self.worker = Worker(settings, store, thread, self.counters, cast(DeadLetters, self.mover), self.spill)
        self.running = asyncio.create_task(self.worker.run())

    async def link(self) -> FakeLink:
        link = FakeLink()
        await self.worker.up(link.link)
        return link

    def devices(self) -> list[str]:
        with self.csv_file.open(newline="") as file:
            return [row[0] for row in csv.reader(file, delimiter=";")][1:]

    def metric(self, index: int) -> float:
        self.worker.tick()
        return self.counters.metrics.values[index]

    @contextmanager
    def slow_appends(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        """Appends wait in the store's thread, as on a disk that hangs, until the block ends; set while one waits."""
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
                b.running.cancel()
                await asyncio.gather(b.running, return_exceptions=True)
                await b.worker.close()
                thread.submit(store.close).result()

    return make


async def test_a_batch_is_stored_and_acked_with_one_ack(bench: MakeBench) -> None:
    async with bench() as b:
        link = await b.link()
        assert link.channel.calls[-2:] == ["qos 2000", "consume predictions"]
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


async def test_poison_of_a_lost_link_is_not_dead_lettered(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again on the next link, on which its delivery tag means another message."""
    async with bench() as b:
        await b.link()
        with b.slow_appends(monkeypatch) as hangs:
            b.worker.deliveries([delivery(1), delivery(2, b"poison")])
            await until("the batch is being stored", hangs.is_set)
            b.worker.down("cut by the test")
            second = await b.link()
        await until("it is stored", lambda: b.devices() == ["device-1"])
        b.worker.deliveries([delivery(1, redelivered=True)])
        await until("it is acked", lambda: second.lane.acks)
        assert not b.worker._outgoing.held
        assert second.lane.acks == [(1, True)]


async def test_nothing_is_acked_that_is_not_stored(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as b:
        link = await b.link()

        def fails(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "data.csv")

        monkeypatch.setattr(b.store, "append", fails)
        b.worker.deliveries([delivery(1)])
        await until("it is told", lambda: "No space left" in b.worker.not_ready())
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


async def test_a_disk_that_hangs_is_told(
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
async def test_a_queue_that_waits_without_deliveries_is_told(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, consumers: int, helps: bool
) -> None:
    """A new link is made, unless another consumer of the queue is the active one."""
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
        await b.worker.drain(b.running)
        assert "cancel tag" in link.channel.calls
        assert (b.devices(), link.lane.acks) == (["device-1", "device-2"], [(2, True)])
        again = await b.link()
        assert "consume predictions" not in again.channel.calls, "it takes nothing new while it drains"


async def test_poison_holds_up_no_ack_of_good_events(bench: MakeBench) -> None:
    async with bench() as b:
        link = await b.link()
        b.worker.deliveries([delivery(1), delivery(2, b"poison"), delivery(3)])
        await until("good events are acked", lambda: link.lane.acks == [(1, True), (3, False)])
        assert b.devices() == ["device-1", "device-3"]
        b.mover.open.set()
        await until("the poison is acked", lambda: len(link.lane.acks) == 3)
        assert link.lane.acks[2][0] == 2
        assert b.mover.moved == [b"poison"]
        assert not b.spill.waiting


async def test_poison_that_takes_long_goes_to_a_file(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is acked once the file is synced, and leaves the file for the dead letters in its order."""
    monkeypatch.setattr(outgoing, "SPILL_AFTER_SECONDS", 0.05)
    async with bench() as b:
        link = await b.link()
        bodies = [b"poison %d" % number for number in range(1, 6)]
        b.worker.deliveries([delivery(tag, body) for tag, body in enumerate(bodies, 1)])
        await until("it is acked", lambda: link.lane.acks == [(5, True)])
        assert Path(b.spill.path).exists()
        assert "dead letters do not reach the broker" in b.worker.not_ready()
        assert b.metric(b.counters.spilled_bytes) > 0
        b.worker.deliveries([delivery(6, b"poison 6"), delivery(7)])
        await until(
            "what comes later joins it at once", lambda: len(link.lane.acks) >= 2 and not b.worker._outgoing.held
        )
        b.mover.open.set()
        await until("nothing waits", lambda: b.worker.not_ready() == "")
        assert not Path(b.spill.path).exists()
        assert b.mover.moved == [*bodies, b"poison 6"]
        assert b.devices() == ["device-7"]


async def test_poison_beyond_the_file_s_bound_stays_unacked(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "SPILL_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(spill, "MOST_BYTES", 200)
    async with bench() as b:
        link = await b.link()
        b.worker.deliveries([delivery(tag, b"poison %d" % tag) for tag in (1, 2, 3)])
        await until("it is told", lambda: "is full" in b.worker.not_ready())
        assert link.lane.acks == [(1, True)]
        b.worker.deliveries([delivery(4)])
        await until("a good event is stored", lambda: b.devices() == ["device-4"])
        b.mover.open.set()
        await until("all is acked", lambda: {tag for tag, _ in link.lane.acks} >= {1, 2, 3, 4})
        assert sorted(b.mover.moved) == [b"poison 1", b"poison 2", b"poison 3"]


async def test_poison_of_a_lost_link_is_acked_on_no_link(bench: MakeBench) -> None:
    async with bench() as b:
        first = await b.link()
        b.worker.deliveries([delivery(1, b"poison")])
        await until("it is on its way", lambda: b.worker._outgoing.held)
        b.worker.down("cut by the test")
        second = await b.link()
        b.mover.open.set()
        b.worker.deliveries([delivery(1, event("good"))])
        await until("the good event is acked", lambda: second.lane.acks)
        assert (first.lane.acks, second.lane.acks) == ([], [(1, True)])
        assert b.mover.moved == []


async def test_a_trickle_waits_in_the_socket_while_a_batch_grows(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read wakes the event loop. It is read before the batch is stored; more than a trickle is never held back."""
    async with bench() as b:
        link = await b.link()
        holds: list[bool] = []
        monkeypatch.setattr(link.lane, "hold_back", holds.append)
        b.worker.deliveries([delivery(1)])
        await until("it is acked", lambda: link.lane.acks)
        assert holds[:2] == [True, False]
        assert not any(holds[2:])
        b.worker.deliveries([delivery(2, event("large", "x" * worker_module.TRICKLE_BYTES))])
        await until("it is acked", lambda: len(link.lane.acks) == 2)
        assert not any(holds[2:])
