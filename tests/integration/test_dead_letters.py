"""Dead letters from the queue to the file, and back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic

from common.amqp.topology import QUEUE_ARGUMENTS
from common.config import ConsumerSettings
from common.consumer import replay
from common.consumer.dead_letters import append
from common.consumer.prepare import Poison
from common.errors import StartupError
from tests.conftest import ROOT, Service, Start
from tests.rabbitmq import RabbitMQ
from tests.support.deliveries import delivery, devices, event, event_line, publish, waiting
from tests.support.polling import until, wait_until


@asynccontextmanager
async def channel(url: str) -> AsyncIterator[AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


async def take_all(url: str, queue: str) -> list[DeliveredMessage]:
    """Return everything in the queue, acked, in order."""
    taken: list[DeliveredMessage] = []

    async def take(found: DeliveredMessage) -> None:
        taken.append(found)
        if len(taken) < there and len(taken) % 1000 == 0:  # RabbitMQ gives out 2,000 at a time
            await opened.basic_ack(len(taken), multiple=True)

    async with channel(url) as opened:
        there = (await opened.queue_declare(queue, passive=True)).message_count or 0
        await opened.basic_consume(queue, take)
        await until(f"{there} messages are taken", lambda: len(taken) >= there)
        if there:  # one ack for many: of many acks, a busy broker drops some when the channel closes after them
            await opened.basic_ack(there, multiple=True)
    return taken[:there]


def ids(messages: list[DeliveredMessage]) -> list[str]:
    return [found.header.properties.message_id or "" for found in messages]


def file_of(csv_file: Path | str) -> Path:
    return Path(f"{csv_file}.dead-letters")


def letters_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def poison(number: int, body: bytes = b"not JSON", **properties: Any) -> Poison:
    return Poison("not_json", "why", b"%032x" % number, 0, delivery(1, body, **properties).header, body)


def memory_bytes(service: Service) -> int:
    """Return the peak of the resident memory."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# The consumer


def test_what_is_not_an_event_goes_to_the_file_with_a_reason(
    broker: RabbitMQ, queue_name: str, consumer: Start
) -> None:
    service = consumer()
    publish(broker.url, queue_name, [event("good")])
    publish(broker.url, queue_name, [b"\xff", b'{"device_id":1}'], content_type="text/x", headers={"camera": 7})
    publish(broker.url, queue_name, [event("good")])
    wait_until("rows are stored", lambda: devices(service.csv_file) == ["good", "good"], explain=service.log)
    first, second = letters_in(file_of(service.csv_file))
    assert (first["body_base64"], second["body"]) == ("/w==", '{"device_id":1}')
    assert first["properties"]["headers"] == {"camera": 7}
    assert second["why"] == "body.client_id: Field required (and 2 more)"
    wait_until("all is acked", lambda: service.metric("predlog_unacked") == 0)
    assert service.metric('predlog_dead_letters_total{reason="not_json"}') == 1
    assert service.metric('predlog_dead_letters_total{reason="not_an_event"}') == 1
    size = file_of(service.csv_file).stat().st_size
    wait_until("its size is a metric", lambda: service.metric("predlog_dead_letters_bytes") == size)
    assert service.not_ready() == ""


def test_a_bad_line_is_a_dead_letter_and_the_others_rows(broker: RabbitMQ, queue_name: str, consumer: Start) -> None:
    service = consumer()
    lines = [event_line(f"{n:032x}", f"device-{n}") for n in range(3)]
    lines[1] = b'{"message_id":"%032x","device_id":1}' % 1
    publish(broker.url, queue_name, [b"\n".join(lines)], content_type="application/x-ndjson", app_id="camera")
    wait_until("rows are stored", lambda: devices(service.csv_file) == ["device-0", "device-2"], explain=service.log)
    [letter] = letters_in(file_of(service.csv_file))
    assert (letter["line"], letter["id"], letter["body"]) == (2, f"{1:032x}", lines[1].decode())
    assert letter["properties"]["app_id"] == "camera"
    wait_until("it is acked", lambda: service.metric("predlog_unacked") == 0)


@pytest.mark.parametrize("change", ["emptied", "deleted"])
def test_the_file_changed_under_a_consumer_takes_later_letters(
    broker: RabbitMQ, queue_name: str, consumer: Start, change: str
) -> None:
    service = consumer()
    path = file_of(service.csv_file)
    publish(broker.url, queue_name, [b"before"])
    counted = 'predlog_dead_letters_total{reason="not_json"}'
    wait_until("it is safe there", lambda: service.metric(counted) == 1, explain=service.log)
    if change == "emptied":
        os.truncate(path, 0)
    else:
        path.unlink()
    publish(broker.url, queue_name, [b"after", event("good")])
    wait_until("the row is stored", lambda: devices(service.csv_file) == ["good"], explain=service.log)
    assert [letter["body"] for letter in letters_in(path)] == ["after"]
    assert (service.not_ready(), service.stop()) == ("", 0)


def test_poison_of_8_mb_is_within_the_bound_on_memory(broker: RabbitMQ, queue_name: str, consumer: Start) -> None:
    """It happens during a memory alarm of the broker, which does not stop dead letters either."""
    for _ in range(5):
        publish(broker.url, queue_name, [b"\xff" * 8_000_000] * 10)
    with broker.memory_alarm():
        service = consumer()
        counted = 'predlog_dead_letters_total{reason="not_json"}'
        wait_until("all are in the file", lambda: service.metric(counted) == 50, 60, service.log)
        assert memory_bytes(service) < 400_000_000


def test_thousands_of_poison_messages_are_a_few_lines(broker: RabbitMQ, queue_name: str, consumer: Start) -> None:
    publish(broker.url, queue_name, [b"poison"] * 5000)
    began, service = time.monotonic(), consumer()
    counted = 'predlog_dead_letters_total{reason="not_json"}'
    wait_until("all are in the file", lambda: service.metric(counted) == 5000, 60, service.log)
    assert service.stop() == 0
    said = [line for line in service.log().splitlines() if "dead letter(s) went to" in line]
    assert "JSON decode error" in said[0]
    assert len(said) <= 2 + time.monotonic() - began
    assert len(letters_in(file_of(service.csv_file))) == 5000


def test_an_upgrade_reports_dead_letters_in_a_queue(broker: RabbitMQ, queue_name: str, consumer: Start) -> None:
    asyncio.run(dead_letter_in_1_0(broker.url, queue_name, 3))
    service = consumer()
    told = f"3 in '{queue_name}.dead'; see docs/scaling.md on changing PARTITIONS; --replay-dead-letters"
    wait_until("it is logged", lambda: told in service.log(), explain=service.log)
    assert service.not_ready() == ""


# The commands


@pytest.fixture
def settings(broker: RabbitMQ, queue_name: str, tmp_path: Path) -> ConsumerSettings:
    (tmp_path / "data.csv").touch()
    return ConsumerSettings(amqp_url=broker.url, queue_name=queue_name, csv_file=str(tmp_path / "data.csv"))


async def dead_letter_in_1_0(url: str, queue_name: str, count: int) -> None:
    async with channel(url) as opened:
        dead = f"{queue_name}.dead"
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}
        await opened.queue_declare(dead, durable=True, arguments=arguments)
        headers: dict[str, Any] = {"x-predlog-reason": "why", "x-predlog-queue": queue_name, "camera": 7}
        for number in range(count):
            properties = Basic.Properties(
                message_id=f"{number:032x}", content_type="application/x-ndjson", delivery_mode=2, headers=headers
            )
            await opened.basic_publish(b"from 1.0", routing_key=dead, properties=properties)


def run(settings: ConsumerSettings, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "consumer.py"), *flags]
    return subprocess.run(
        command, env=environment_of(settings) | environment, capture_output=True, text=True, timeout=60, check=False
    )


def environment_of(settings: ConsumerSettings) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "AMQP_URL": settings.amqp_url,
        "QUEUE_NAME": settings.queue_name,
        "CSV_FILE": settings.csv_file,
    }


def test_listing_changes_nothing_and_needs_no_broker(settings: ConsumerSettings) -> None:
    append(settings.csv_file, [poison(number) for number in range(600)])
    before = file_of(settings.csv_file).read_bytes()
    listed = run(settings, "--dead-letters", AMQP_URL="amqp://127.0.0.1:1/")
    assert (listed.returncode, listed.stderr) == (0, "")
    head, *lines = listed.stdout.splitlines()
    assert head.split()[:4] == ["ID", "WHY", "WHEN", "SIZE"]
    assert [line.split()[0] for line in lines] == [f"{n:032x}" for n in range(600)]
    assert file_of(settings.csv_file).read_bytes() == before


def test_a_reader_that_has_enough_ends_the_list_quietly(settings: ConsumerSettings) -> None:
    append(settings.csv_file, [poison(number) for number in range(3000)])
    command = f"{sys.executable} {ROOT}/consumer.py --dead-letters | head -n 1"
    done = subprocess.run(command, shell=True, env=environment_of(settings), capture_output=True, timeout=60)
    assert (done.stdout[:2], done.stderr) == (b"ID", b"")


@pytest.mark.parametrize("flag", ["--dead-letters", "--replay-dead-letters"])
def test_without_dead_letters_the_commands_say_only_that(settings: ConsumerSettings, flag: str) -> None:
    done = run(settings, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"no dead letters in {file_of(settings.csv_file)}\n"


async def test_a_replay_publishes_all_and_leaves_no_file(
    settings: ConsumerSettings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    append(settings.csv_file, [poison(number, b"%d" % number, headers={"n": number}) for number in range(1000)])
    append(settings.csv_file, [poison(1000, os.urandom(300_000))._replace(id=None)])  # of several frames
    [*_, last] = letters_in(file_of(settings.csv_file))
    assert await replay.replay(settings) == 0
    assert "published 1001 from" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]
    taken = await take_all(settings.amqp_url, settings.queue_name)
    back = dict(zip(ids(taken), taken, strict=True))
    assert sorted(back) == sorted([f"{n:032x}" for n in range(1000)] + [last["id"]])
    assert {found.header.properties.delivery_mode for found in back.values()} == {2}
    one = back[f"{7:032x}"]
    assert (one.body, one.header.properties.content_type) == (b"7", "application/json")


async def test_a_replay_empties_the_queue_of_1_0(settings: ConsumerSettings) -> None:
    await dead_letter_in_1_0(settings.amqp_url, settings.queue_name, 600)
    assert await replay.replay(settings) == 0
    back = await take_all(settings.amqp_url, settings.queue_name)
    assert ids(back) == [f"{n:032x}" for n in range(600)]
    assert {found.header.properties.content_type for found in back} == {"application/x-ndjson"}
    assert await waiting(settings.amqp_url, f"{settings.queue_name}.dead") == 0


KILL_SWITCH = """
import asyncio, os, signal, sys
from common.consumer import replay
from common.config import ConsumerSettings

point, url, queue, csv = sys.argv[1:]
pages, publish, truncate, unlink = 0, replay._publish, os.ftruncate, os.unlink

def die(here):
    if point == here and pages >= 2:
        os.kill(os.getpid(), signal.SIGKILL)

async def dying_publish(*arguments):
    global pages
    pages += 1
    die("read")
    publishing = asyncio.ensure_future(publish(*arguments))
    await asyncio.sleep(0.001)
    die("sent")
    await publishing
    die("confirmed")

def dying_truncate(*arguments):
    truncate(*arguments)
    die("removed")

def dying_unlink(path):
    die("emptied")
    unlink(path)

replay._publish, os.ftruncate, os.unlink = dying_publish, dying_truncate, dying_unlink
asyncio.run(replay.replay(ConsumerSettings(amqp_url=url, queue_name=queue, csv_file=csv)))
"""


@pytest.mark.parametrize("point", ["read", "sent", "confirmed", "removed", "emptied"])
async def test_a_replay_that_is_killed_loses_none(settings: ConsumerSettings, point: str, tmp_path: Path) -> None:
    """At most one page is repeated, under the same ids. Every line of the file is whole at that moment."""
    count = 600
    append(settings.csv_file, [poison(number) for number in range(count)])
    command = [sys.executable, "-c", KILL_SWITCH, point, settings.amqp_url, settings.queue_name, settings.csv_file]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert await asyncio.wait_for(process.wait(), 40) == -signal.SIGKILL
    left = letters_in(Path(f"{file_of(settings.csv_file)}.replay"))
    append(settings.csv_file, [poison(count)])  # a later one
    assert await replay.replay(settings) == 0
    back = ids(await take_all(settings.amqp_url, settings.queue_name))
    assert set(back) == {f"{n:032x}" for n in range(count + 1)}
    assert len(left) <= count - replay.PAGE_LETTERS
    assert len(back) <= count + 1 + replay.PAGE_LETTERS
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


async def test_a_replay_into_a_full_queue_keeps_the_rest(
    settings: ConsumerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "QUEUE_ARGUMENTS", {"x-max-length": 300, "x-overflow": "reject-publish"})
    append(settings.csv_file, [poison(number) for number in range(1000)])
    with pytest.raises(StartupError, match="accepts no more messages"):
        await replay.replay(settings)
    os.close(replay._take(str(file_of(settings.csv_file))))  # it has let go of the file
    left = letters_in(Path(f"{file_of(settings.csv_file)}.replay"))
    moved = ids(await take_all(settings.amqp_url, settings.queue_name))
    assert {letter["id"] for letter in left} | set(moved) == {f"{n:032x}" for n in range(1000)}
    assert 0 < len(left) < 1000


async def test_a_second_replay_is_refused_with_one_line(settings: ConsumerSettings) -> None:
    append(settings.csv_file, [poison(1)])
    fd = replay._take(str(file_of(settings.csv_file)))
    try:
        with pytest.raises(StartupError, match="another replay, or the consumer, is using it"):
            await replay.replay(settings)
    finally:
        os.close(fd)
    assert await replay.replay(settings) == 0
    assert len(await take_all(settings.amqp_url, settings.queue_name)) == 1


async def test_a_damaged_line_is_published_as_it_is(settings: ConsumerSettings) -> None:
    """It comes back as a dead letter, or becomes rows if it is an event."""
    append(settings.csv_file, [poison(1)])
    with file_of(settings.csv_file).open("ab") as file:
        file.write(b'{"when":\n')
    append(settings.csv_file, [poison(2)])
    assert await replay.replay(settings) == 0
    back = await take_all(settings.amqp_url, settings.queue_name)
    assert sorted(bytes(found.body) for found in back) == [b"not JSON", b"not JSON", b'{"when":']


def test_a_replay_beside_a_consumer_ends_with_rows(
    broker: RabbitMQ, queue_name: str, consumer: Start, settings: ConsumerSettings
) -> None:
    """What was corrected by hand becomes rows, once each; what is still not an event returns to the file."""
    service = consumer()
    publish(broker.url, queue_name, [b"poison %d" % number for number in range(700)])
    path = file_of(service.csv_file)
    wait_until("all are in the file", lambda: len(letters_in(path)) == 700, explain=service.log)
    good, bad = letters_in(path)[:400], letters_in(path)[400:]
    for number, letter in enumerate(good):
        letter["body"] = event(f"device-{number}").decode()
    path.write_text("".join(json.dumps(letter) + "\n" for letter in [*good, *bad]))
    for _ in range(2):
        done = run(settings, "--replay-dead-letters")
        assert done.returncode == 0, done.stderr
        wait_until("the rest is back", lambda: len(letters_in(path)) == 300, explain=service.log)
        assert {letter["id"] for letter in letters_in(path)} == {letter["id"] for letter in bad}
    wait_until("rows are stored", lambda: len(devices(service.csv_file)) == 400, explain=service.log)
    assert sorted(devices(service.csv_file)) == sorted(f"device-{number}" for number in range(400))


async def test_what_is_wrong_with_a_replay_is_one_line(
    broker: RabbitMQ, settings: ConsumerSettings, nobodys_port: int
) -> None:
    append(settings.csv_file, [poison(1)])
    for url, said in (
        (f"amqp://guest:guest@127.0.0.1:{nobodys_port}/", rf"^no broker at amqp://guest:.*:{nobodys_port}/ "),
        (broker.url.replace("guest:guest", "guest:wrong"), "refused user or password"),
    ):
        wrong = ConsumerSettings(amqp_url=url, queue_name=settings.queue_name, csv_file=settings.csv_file)
        with pytest.raises(StartupError, match=said):
            await replay.replay(wrong)
    assert len(letters_in(file_of(settings.csv_file))) == 1


async def test_the_commands_work_on_every_partition(settings: ConsumerSettings, tmp_path: Path) -> None:
    """With PARTITION, they work on those that it names."""
    for partition in range(3):
        append(str(tmp_path / f"data.{partition}.csv"), [poison(partition), poison(partition + 10)])
    listed = await asyncio.to_thread(run, settings, "--dead-letters", PARTITIONS="3")
    assert (listed.returncode, len(listed.stdout.splitlines())) == (0, 9), listed.stderr
    done = await asyncio.to_thread(run, settings, "--replay-dead-letters", PARTITIONS="3", PARTITION="1-2")
    assert done.returncode == 0, done.stderr
    for partition, left in enumerate((2, 0, 0)):
        assert len(letters_in(file_of(tmp_path / f"data.{partition}.csv"))) == left
        if not left:
            assert await waiting(settings.amqp_url, f"{settings.queue_name}.{partition}") == 2


async def test_a_replay_declares_the_queue(settings: ConsumerSettings) -> None:
    append(settings.csv_file, [poison(1)])
    assert await replay.replay(settings) == 0
    async with channel(settings.amqp_url) as opened:  # declared as the consumer does
        await opened.queue_declare(settings.queue_name, durable=True, arguments=dict(QUEUE_ARGUMENTS))
