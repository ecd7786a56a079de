"""What must not stop the consumer silently: partitions in trouble, queues that nobody serves, tasks that end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import ConsumerSettings
from common.consumer.metrics import Counters
from common.consumer.service import ConsumerService
from common.storage.lock import Lock
from scripts.rabbitmq import free_port
from tests.conftest import Service, Start
from tests.proxy import Proxy
from tests.rabbitmq import RabbitMQ
from tests.support.deliveries import devices, event, publish
from tests.support.polling import until, wait_until


@pytest.fixture
def partitioned(consumer: Start) -> Service:
    """One consumer of four partitions."""
    return consumer(wait=False, PARTITIONS=4)


def test_each_partition_has_a_csv_and_one_port_shows_all(
    broker: RabbitMQ, queue_name: str, partitioned: Service, tmp_path: Path
) -> None:
    partitioned.wait_until_ready()
    for number in range(4):
        publish(broker.url, f"{queue_name}.{number}", [event(f"device-{number}")] * (number + 1))
    wait_until("all are stored", lambda: partitioned.metric("predlog_rows_total") == 10, explain=partitioned.log)
    for number in range(4):
        assert devices(tmp_path / f"data.{number}.csv") == [f"device-{number}"] * (number + 1)
        assert (tmp_path / f"data.{number}.csv.journal").exists()
        assert partitioned.metric(f'predlog_partition_rows_total{{partition="{number}"}}') == number + 1
    assert partitioned.metric("predlog_active") == 4
    assert partitioned.stop() == 0


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which the file `ballast` fills."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_of_one_partition_stops_no_other(
    broker: RabbitMQ, queue_name: str, consumer: Start, full_disk: Path, tmp_path: Path
) -> None:
    csv_files = [tmp_path / "data.0.csv", full_disk / "data.1.csv"]
    (tmp_path / "data.1.csv").symlink_to(csv_files[1])
    for number in range(2):
        publish(broker.url, f"{queue_name}.{number}", [event(f"device-{number}")])
    service = consumer(wait=False, PARTITIONS=2)
    wait_until("the other stores", lambda: devices(csv_files[0]) == ["device-0"], explain=service.log)

    def it_alone_is_named() -> bool:
        said = service.not_ready()
        named = said.startswith("partition 1: cannot store: ") and "No space left on device" in said
        return named and "partition 0" not in said

    wait_until("it alone is named", it_alone_is_named, explain=service.log)
    (full_disk / "ballast").unlink()
    wait_until("it stores again", lambda: devices(csv_files[1]) == ["device-1"], explain=service.log)
    wait_until("all is well", lambda: service.not_ready() == "")


async def test_a_service_starts_drains_and_closes_in_process(broker: RabbitMQ, queue_name: str, tmp_path: Path) -> None:
    """A second one on the same CSV is a standby, and takes over when the first is closed."""
    settings = ConsumerSettings(amqp_url=broker.url, queue_name=queue_name, csv_file=str(tmp_path / "data.csv"))
    counters = Counters()
    first, second = ConsumerService(settings, Counters()), ConsumerService(settings, counters)
    await first.start()
    await until("the first is ready", lambda: first.not_ready() == "")
    await second.start()
    await until("the second waits", lambda: "standby" in second.not_ready())
    await asyncio.to_thread(publish, broker.url, queue_name, [event("device-1")])
    await until("the row is stored", lambda: devices(tmp_path / "data.csv") == ["device-1"])
    await first.drain()
    await first.close()
    await until("the second takes over", lambda: second.not_ready() == "")
    await asyncio.to_thread(publish, broker.url, queue_name, [event("device-2")])
    await until("the row is counted", lambda: counters.metrics.values[counters.rows] == 1)
    assert devices(tmp_path / "data.csv") == ["device-1", "device-2"]
    await second.drain()
    await second.close()


def test_messages_of_another_partitions_value_are_reported(broker: RabbitMQ, queue_name: str, consumer: Start) -> None:
    """There are one line and a metric until the old queues are empty, for both directions."""
    publish(broker.url, f"{queue_name}.0", [event("device-0")] * 3)
    publish(broker.url, f"{queue_name}.1", [])
    publish(broker.url, f"{queue_name}.2", [event("device-2")] * 2)
    shrunk = consumer(wait=False)
    said = "messages wait in queues that no consumer serves with PARTITIONS={}: {}"
    told = said.format(1, f"3 in '{queue_name}.0', 2 in '{queue_name}.2'")
    wait_until("it is reported", lambda: told in shrunk.log(), explain=shrunk.log)
    shrunk.wait_until_ready()  # it listens later than it logs
    wait_until("it is counted", lambda: shrunk.metric("predlog_unserved_messages") == 5)
    assert shrunk.log().count(told) == 1
    assert shrunk.stop() == 0
    publish(broker.url, queue_name, [event("device")])
    grown = consumer(wait=False, PARTITIONS=2)
    told = said.format(2, f"1 in '{queue_name}', 2 in '{queue_name}.2'")
    wait_until("it is reported", lambda: told in grown.log(), explain=grown.log)
    grown.wait_until_ready()
    wait_until("what it serves is stored", lambda: grown.metric("predlog_rows_total") == 3, explain=grown.log)


def test_a_path_that_is_not_text_silences_no_partition(
    broker: RabbitMQ, queue_name: str, consumer: Start, tmp_path: Path
) -> None:
    csv_file = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv")
    Path(f"{csv_file.removesuffix('.csv')}.1.csv.dead-letters").mkdir()
    service = consumer(wait=False, PARTITIONS=2, CSV_FILE=csv_file, SHUTDOWN_TIMEOUT_MS=500)
    service.wait_until_ready()
    publish(broker.url, f"{queue_name}.1", [b"poison"])
    wait_until("it is reported", lambda: "is not a regular file" in service.not_ready(), explain=service.log)
    assert service.not_ready().startswith("partition 1: cannot store: ")
    assert "/\\udcff.1.csv.dead-letters: " in service.not_ready()


async def test_a_bug_in_the_watch_ends_the_service(broker: RabbitMQ, queue_name: str, tmp_path: Path) -> None:
    """A supervisor then starts another, and an operator sees why."""

    def report(reason: str) -> None:
        raise ValueError("a fault")

    settings = ConsumerSettings(amqp_url=broker.url, queue_name=queue_name, csv_file=str(tmp_path / "data.csv"))
    service = ConsumerService(settings, Counters(), report=report)
    await service.start()
    with pytest.raises(ValueError, match="a fault"):
        await asyncio.wait_for(service.running, 20)
    await service.close()


@pytest.mark.parametrize("call", ["acquire", "release"])
async def test_the_health_port_answers_while_the_disk_hangs(
    broker: RabbitMQ, queue_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    hangs, go_on = threading.Event(), threading.Event()
    real = getattr(Lock, call)

    def hanging(lock: Lock) -> object:
        hangs.set()
        assert go_on.wait(20)
        return real(lock)

    monkeypatch.setattr(Lock, call, hanging)
    settings = ConsumerSettings(
        amqp_url=broker.url, queue_name=queue_name, csv_file=str(tmp_path / "data.csv"), health_port=free_port()
    )
    service = ConsumerService(settings, Counters())
    await service.start()
    if call == "release":
        await until("it is ready", lambda: service.not_ready() == "")
    closing = asyncio.create_task(service.close()) if call == "release" else None
    await until("the disk hangs", hangs.is_set)
    reader, writer = await asyncio.open_connection("127.0.0.1", settings.health_port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 200")
    writer.close()
    go_on.set()
    await (closing or service.close())


def test_a_user_of_one_channel_gets_its_rows(node: RabbitMQ, queue_name: str, consumer: Start) -> None:
    """The look for messages that no consumer serves needs a second channel, and is given up."""
    publish(node.url, queue_name, [event("device")])
    guest = {"name": "guest", "password": "guest", "tags": "administrator"}
    node.define(users=[guest | {"limits": {"max-channels": 1}}])
    try:
        service = consumer(AMQP_URL=node.url)
        wait_until("the row is stored", lambda: devices(service.csv_file) == ["device"], explain=service.log)
        assert service.metric("predlog_amqp_reconnects_total") == 0
        assert service.log().count("connected") == 1
    finally:
        node.define(users=[guest | {"limits": {"max-channels": -1}}])


async def test_a_new_password_is_used_after_sighup(
    broker: RabbitMQ, queue_name: str, consumer: Start, tmp_path: Path
) -> None:
    secret = tmp_path / "amqp_url"
    async with Proxy(broker.port) as before, Proxy(broker.port) as after:
        secret.write_text(f"{before.url}\n")
        service = consumer(wait=False, AMQP_URL="", AMQP_URL_FILE=secret)
        await until("it is connected", lambda: "connected to" in service.log())
        secret.write_text(after.url)
        service.process.send_signal(signal.SIGHUP)
        await before.close()
        await until("it is connected again", lambda: "connected again" in service.log())
        await asyncio.to_thread(service.wait_until_ready)
        assert await asyncio.to_thread(service.stop) == 0
