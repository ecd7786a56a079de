"""The consumer's end: whatever is under way, it stops in time; a message is a row or still in the queue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiormq
import pytest

from common.amqp.codec import Delivery, PublishEncoder, packed_seconds
from common.amqp.link import open_link
from common.amqp.topology import QUEUE_ARGUMENTS, begin_publishing, declare
from common.amqp.window import ConfirmWindow
from common.config import ConsumerSettings
from common.consumer.metrics import Counters
from common.consumer.worker import Worker
from common.process import end
from common.storage.store import Store
from tests.conftest import Service, Start
from tests.proxy import Proxy
from tests.rabbitmq import RabbitMQ
from tests.support.deliveries import event
from tests.support.lane import Heard
from tests.support.polling import until

BACKLOG = 4000
SHUTDOWN_TIMEOUT_MS = 1500


async def publish(url: str, queue_name: str, bodies: list[bytes]) -> None:
    """Publish all at once, and wait until the broker has confirmed each."""
    heard = Heard()
    link = await open_link(url, "test", heard)
    await begin_publishing(link, asyncio.Event())
    await declare(link.channel, queue_name, QUEUE_ARGUMENTS)
    confirmed: list[bool] = []
    window = ConfirmWindow[bytes]()
    encoder = PublishEncoder(queue_name, link.frame_max)
    for number, body in enumerate(bodies):
        link.lane.send(encoder.encode(body, b"%032d" % number, packed_seconds(0)))
        window.add(body)

    def all_confirmed() -> bool:
        confirmed.extend(ok for _, ok in window.settle(heard.confirmed))
        heard.confirmed.clear()
        assert all(confirmed)
        return len(confirmed) == len(bodies)

    await until("all is confirmed", all_confirmed)
    await link.close()


async def devices_in_queue(url: str, queue_name: str, count: int) -> list[str]:
    """Return all in the queue, once there are `count`: what a consumer held comes back a moment after its end."""
    found: list[str] = []

    async def take(message: Any) -> None:
        found.append(json.loads(message.body)["device_id"])

    async with aiormq.connect(url) as connection:
        channel = await connection.channel()

        async def is_empty() -> bool:
            return (await channel.queue_declare(queue_name, passive=True)).message_count == 0

        await channel.basic_consume(queue_name, take, no_ack=True)
        await until(f"{count} are taken", lambda: len(found) >= count)
        await until("nothing is left", is_empty)
    return found


def devices_in_csv(csv_file: Path) -> list[str]:
    lines = list[str]()
    with contextlib.suppress(FileNotFoundError):  # not there yet, or in the middle of a rotation
        lines = csv_file.read_text().splitlines()[1:]
    return [line.partition(";")[0] for line in lines]


async def stopped(service: Service) -> int:
    """Send SIGTERM; return the exit code. The loop runs meanwhile, for its proxy."""
    return await asyncio.to_thread(service.stop)


async def test_sigterm_in_a_backlog_acks_exactly_what_is_stored(
    broker: RabbitMQ, queue_name: str, consumer: Start
) -> None:
    devices = [f"device-{number}" for number in range(BACKLOG)]
    await publish(broker.url, queue_name, [event(device) for device in devices])
    service = consumer(wait=False, PREFETCH_COUNT=5, FLUSH_INTERVAL_MS=1)
    await until("rows are stored", lambda: len(devices_in_csv(service.csv_file)) >= 100)
    assert await stopped(service) == 0
    rows = devices_in_csv(service.csv_file)
    rest = await devices_in_queue(broker.url, queue_name, BACKLOG - len(rows))
    assert rest, "it was to be stopped in the middle"
    assert sorted(rows + rest) == sorted(devices)
    assert "connection lost" not in service.log()
    assert "connected again" not in service.log()


@pytest.mark.parametrize("trouble", ["never there", "gone", "silent"])
async def test_sigterm_while_the_broker_is_away_ends_in_time(
    broker: RabbitMQ, queue_name: str, consumer: Start, trouble: str
) -> None:
    async with Proxy(broker.port) as proxy:
        if trouble == "never there":
            await proxy.close()
        service = consumer(wait=False, AMQP_URL=proxy.url, SHUTDOWN_TIMEOUT_MS=SHUTDOWN_TIMEOUT_MS)
        if trouble == "never there":
            await until("it waits", lambda: "waiting for it" in service.log())
        else:
            await asyncio.to_thread(service.wait_until_ready)
            await publish(broker.url, queue_name, [event("device")])
            await until("the row is stored", lambda: devices_in_csv(service.csv_file) == ["device"])
        if trouble == "gone":
            await proxy.close()
            await until("it has noticed", lambda: "connection lost" in service.log())
        proxy.silent = True
        began = time.monotonic()
        assert await stopped(service) == 0, service.log()
        assert time.monotonic() - began < SHUTDOWN_TIMEOUT_MS / 1000 + 6  # which is less than the default
        assert "Traceback" not in service.log()


async def test_a_failed_rotation_is_logged_once_and_rows_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    csv_file = tmp_path / "data.csv"
    settings = ConsumerSettings(amqp_url="amqp://127.0.0.1:1/", rotate_bytes=1, flush_interval_ms=0)
    header = b"\x00\x3c\x00\x00" + bytes(8) + b"\x00\x00"  # no properties
    with ThreadPoolExecutor(1) as thread:
        store = thread.submit(Store.open, str(csv_file), 100, 10, logging.getLogger("predlog.consumer")).result()
        rotate, broken, sent = store.rotate, True, 0

        def rotate_or_not() -> str | None:
            if broken:
                raise OSError(30, "Read-only file system", str(csv_file))
            return rotate()

        monkeypatch.setattr(store, "rotate", rotate_or_not)
        worker = Worker(settings, store, thread, Counters())

        async def store_rows(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                sent += 1
                worker.deliveries([Delivery(sent, False, header, event(f"device-{sent}"))])
                await until("the row is stored", lambda: len(all_devices(tmp_path)) == sent)  # noqa: B023

        def said() -> int:
            return sum("cannot begin a new file" in record.getMessage() for record in caplog.records)

        await store_rows(20)
        assert said() == 1
        broken = False
        await store_rows(2)
        assert len(list(tmp_path.glob("data-*.csv"))) >= 1
        broken = True
        await store_rows(5)
        assert said() == 2
        assert sorted(all_devices(tmp_path)) == sorted(f"device-{number}" for number in range(1, sent + 1))
        assert "cannot store" not in worker.not_ready()
        await end(worker.running)
        thread.submit(store.close).result()


def all_devices(folder: Path) -> list[str]:
    return [device for path in folder.glob("data*.csv") for device in devices_in_csv(path)]
