"""Dead letters on a real RabbitMQ."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from common.amqp import link as link_module
from common.amqp.codec import Delivery
from common.amqp.link import Link, open_link
from common.amqp.topology import DEAD_LETTER_ARGUMENTS, QUEUE_ARGUMENTS, dead_letter_queue, declare
from common.config import ConsumerSettings
from common.consumer.dead_letters import commands, mover
from common.consumer.dead_letters.message import dead_copy
from common.consumer.dead_letters.mover import DeadLetters, OutboxListener
from common.errors import StartupError
from tests.conftest import ROOT
from tests.rabbitmq import RabbitMQ
from tests.support.polling import until


def message(body: bytes, **properties: object) -> Delivery:
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(**properties))  # type: ignore[arg-type]
    return Delivery(1, False, header.marshal(), body)


@asynccontextmanager
async def channel(url: str) -> AsyncIterator[AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


async def waiting(url: str, queue: str) -> int:
    async with channel(url) as opened:
        return (await opened.queue_declare(queue, passive=True)).message_count or 0


async def until_it_holds(url: str, queue: str, count: int) -> None:
    async def holds() -> bool:
        return await waiting(url, queue) == count

    await until(f"'{queue}' holds {count} messages", holds)


async def take_all(url: str, queue: str) -> list[DeliveredMessage]:
    """Everything in the queue, acked, in order."""
    taken: list[DeliveredMessage] = []

    async def take(found: DeliveredMessage) -> None:
        taken.append(found)
        if len(taken) < there and len(taken) % 1000 == 0:  # RabbitMQ gives out 2,000 at a time
            await opened.basic_ack(len(taken), multiple=True)

    async with channel(url) as opened:
        there = (await opened.queue_declare(queue, passive=True)).message_count or 0
        await opened.basic_consume(queue, take)
        await until(f"{there} messages are taken", lambda: len(taken) >= there)
        if there:  # one ack for many: of many acks, a busy broker drops some when the channel closes behind them
            await opened.basic_ack(there, multiple=True)
    return taken[:there]


def ids(messages: list[DeliveredMessage]) -> list[str]:
    return [found.header.properties.message_id or "" for found in messages]


async def dead_letter_many(url: str, queue_name: str, count: int, body: bytes = b"not JSON") -> None:
    """Like `move`, thousands at a time."""
    copies_out = OutboxListener()
    link = await open_link(url, "test", copies_out)
    await declare(link.channel, dead := dead_letter_queue(queue_name), DEAD_LETTER_ARGUMENTS)
    outbox, now = copies_out.open(link), datetime.now(UTC)
    originals = [message(body, message_id=f"{n:032x}") for n in range(count)]
    copies = [dead_copy(original, queue_name, "not JSON", now, b"") for original in originals]
    futures = [outbox.publish(dead, copy) for copy in copies]
    await outbox.wait(futures)
    assert not any(future.exception() for future in futures)
    await link.close()


@pytest.fixture
def settings(broker: RabbitMQ, queue_name: str) -> ConsumerSettings:
    return ConsumerSettings(amqp_url=broker.url, queue_name=queue_name)


@pytest.fixture
def dead(queue_name: str) -> str:
    return dead_letter_queue(queue_name)


@pytest.fixture
async def letters(broker: RabbitMQ, queue_name: str) -> AsyncIterator[DeadLetters]:
    opened = DeadLetters(broker.url, queue_name)
    yield opened
    await opened.close()


# Moving


async def test_a_buried_message_is_whole_and_says_why_and_when(
    broker: RabbitMQ, letters: DeadLetters, queue_name: str, dead: str
) -> None:
    body = os.urandom(300_000)  # of several frames
    original = message(body, content_type="text/x", message_id="an id", headers={"camera": "7"}, delivery_mode=1)
    await letters.move(original, "not JSON")
    (found,) = await take_all(broker.url, dead)
    properties = found.header.properties
    assert found.body == body
    assert (properties.content_type, properties.message_id, properties.delivery_mode) == ("text/x", "an id", 2)
    assert properties.headers is not None
    when = datetime.fromisoformat(str(properties.headers.pop("x-predlog-time")))
    assert timedelta(0) <= datetime.now(UTC) - when < timedelta(seconds=30)
    assert properties.headers == {
        "camera": "7",
        "x-predlog-reason": "not JSON",
        "x-predlog-queue": queue_name,
    }


async def test_dead_letters_arrive_though_connections_break(broker: RabbitMQ, letters: DeadLetters, dead: str) -> None:
    """Messages dead-lettered at the same time while connections break all arrive."""
    copying = [asyncio.ensure_future(letters.move(message(b"x", message_id=str(n)), "why")) for n in range(300)]
    for _ in range(3):
        while letters.outbox is None:
            await asyncio.sleep(0)
        letters.outbox._link.lane.fail("cut by the test")
        await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.gather(*copying), 40)
    assert set(ids(await take_all(broker.url, dead))) == {str(n) for n in range(300)}


async def test_a_deleted_queue_of_dead_letters_is_declared_again(
    broker: RabbitMQ, letters: DeadLetters, dead: str
) -> None:
    """A queue of dead letters that was deleted is declared again."""
    await letters.move(message(b"x", message_id="before"), "why")
    async with channel(broker.url) as opened:
        await opened.queue_delete(dead)
    await asyncio.wait_for(letters.move(message(b"x", message_id="after"), "why"), 40)
    assert ids(await take_all(broker.url, dead)) == ["after"]


async def test_a_move_waits_for_a_broker_that_is_not_there_yet(
    broker: RabbitMQ, letters: DeadLetters, dead: str, monkeypatch: pytest.MonkeyPatch, nobodys_port: int
) -> None:
    monkeypatch.setattr(letters, "_url", f"amqp://guest:guest@127.0.0.1:{nobodys_port}/")
    copying = asyncio.ensure_future(letters.move(message(b"x"), "why"))
    await asyncio.sleep(0.3)
    assert not copying.done()
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    await letters.close()


async def test_a_queue_with_other_arguments_is_said_and_waited_for(
    broker: RabbitMQ,
    letters: DeadLetters,
    dead: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A move to the dead letters waits while the queue has other arguments and says so once."""
    monkeypatch.setattr(mover, "BACKOFF_SECONDS", 0.01)
    async with channel(broker.url) as opened:
        await opened.queue_declare(dead, durable=True)
        copying = asyncio.ensure_future(letters.move(message(b"x", message_id="m"), "why"))
        await until("it is said", lambda: any(dead in said for said in caplog.messages))
        await opened.queue_delete(dead)
        await asyncio.wait_for(copying, 40)
    assert sum("exists with other arguments" in said for said in caplog.messages) == 1
    assert ids(await take_all(broker.url, dead)) == ["m"]


async def test_a_refused_copy_goes_without_its_properties(
    broker: RabbitMQ, letters: DeadLetters, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that the broker refuses for its properties is dead-lettered without them."""
    monkeypatch.setattr("common.consumer.dead_letters.message._DROPPED_PROPERTIES", frozenset())
    monkeypatch.setattr(mover, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(link_module, "BACKOFF_FIRST_SECONDS", 0.01)
    await asyncio.wait_for(letters.move(message(b"x", message_id="m", user_id="nobody"), "why"), 40)
    (found,) = await take_all(broker.url, dead)
    assert found.header.properties.message_id == "m"
    assert found.header.properties.headers is not None
    assert found.header.properties.headers["x-predlog-reason"] == "why"


async def test_a_nack_is_tried_again_until_there_is_room(
    broker: RabbitMQ, queue_name: str, dead: str, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    monkeypatch.setattr(mover, "DEAD_LETTER_ARGUMENTS", full)
    monkeypatch.setattr(mover, "BACKOFF_SECONDS", 0.05)
    await letters.move(message(b"first"), "why")
    second = asyncio.ensure_future(letters.move(message(b"second"), "why"))
    third = asyncio.ensure_future(letters.move(message(b"third"), "why"))
    taken: list[bytes] = []

    async def all_are_taken() -> bool:
        taken.extend([bytes(found.body) for found in await take_all(broker.url, dead)])
        return len(taken) == 3

    await until("all three are taken", all_are_taken)
    await asyncio.wait_for(asyncio.gather(second, third), 40)
    assert sorted(taken) == [b"first", b"second", b"third"]


async def test_a_blocked_broker_gets_one_copy_once_it_is_unblocked(
    broker: RabbitMQ, letters: DeadLetters, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "POLL_SECONDS", 0.05)
    await letters.move(message(b"before"), "why")
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.00001")
    try:
        copying = asyncio.ensure_future(letters.move(message(b"after"), "why"))
        await until("it knows", lambda: letters.outbox is not None and letters.outbox._blocked)
        with monkeypatch.context() as impatient:  # only now: a busy broker confirms late
            impatient.setattr(mover, "CONFIRM_TIMEOUT_SECONDS", 0.2)
            await asyncio.sleep(1)
        assert not copying.done()
    finally:
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.4")
    await asyncio.wait_for(copying, 40)
    assert [found.body for found in await take_all(broker.url, dead)] == [b"before", b"after"]


# Commands


async def test_looking_changes_nothing(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    await dead_letter_many(broker.url, settings.queue_name, 600)
    expected = [f"{n:032x}" for n in range(600)]
    for _ in range(2):
        assert await commands.show(settings) == 0
        lines = capsysbinary.readouterr().out.decode().splitlines()
        assert lines[0].split()[:4] == ["ID", "REASON", "WHEN", "SIZE"]
        assert [line.split()[0] for line in lines[1:]] == expected
        assert await commands.export([settings], str(tmp_path / "out")) == 0
        exported = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        assert [entry["id"] for entry in exported] == expected
        assert {entry["body"] for entry in exported} == {"not JSON"}
        await until_it_holds(broker.url, dead, 600)
        capsysbinary.readouterr()
    assert ids(await take_all(broker.url, dead)) == expected


async def test_an_export_to_stdout_is_json_lines_only(
    broker: RabbitMQ, settings: ConsumerSettings, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    await dead_letter_many(broker.url, settings.queue_name, 3, b"\xff")
    assert await commands.export([settings], "-") == 0
    exported = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [entry["body_base64"] for entry in exported] == ["/w=="] * 3


async def test_a_replay_moves_everything_back_as_it_was(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, letters: DeadLetters, capsys: pytest.CaptureFixture[str]
) -> None:
    originals = [message(b"%d" % n, message_id=f"{n:032x}", headers={"n": n}, delivery_mode=2) for n in range(20)]
    originals += [message(b"without an id"), message(b"without an id")]
    for original in originals:
        await letters.move(original, "why")
    assert await commands.replay(settings) == 0
    assert "moved 22 of 22" in capsys.readouterr().out
    await until_it_holds(broker.url, dead, 0)
    back = await take_all(broker.url, settings.queue_name)
    assert [found.body for found in back] == [original.body for original in originals]
    assert [found.header.properties.marshal() for found in back[:20]] == [o.header[12:] for o in originals[:20]]
    given = ids(back)[20:]
    assert [len(each) for each in given] == [32, 32]
    assert len(set(given)) == 2


async def test_thousands_of_dead_letters_stay_in_order(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, capsysbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    """Thousands of dead letters are listed exported and replayed in order within seconds."""
    count = 3000
    await dead_letter_many(broker.url, settings.queue_name, count)
    await commands.show(settings)
    assert capsysbinary.readouterr().out.count(b"\n") == count + 1
    await until_it_holds(broker.url, dead, count)
    await commands.export([settings], str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes().count(b"\n") == count
    await until_it_holds(broker.url, dead, count)
    await commands.replay(settings)
    await until_it_holds(broker.url, dead, 0)
    assert ids(await take_all(broker.url, settings.queue_name)) == [f"{n:032x}" for n in range(count)]


KILL_SWITCH = """
import asyncio, os, signal, sys
from common.consumer.dead_letters import commands, mover
from common.config import ConsumerSettings

def die():
    os.kill(os.getpid(), signal.SIGKILL)

point, url, queue = sys.argv[1:]
outbox = mover.Outbox
publish, wait, looked = outbox.publish, outbox.wait, commands._pages
published = pages = 0

async def dying_wait(self, futures):
    global pages
    pages += 1
    if point == "sent" and pages == 2:
        await asyncio.sleep(0)  # the frames are written with the next turn of the loop
        die()
    await wait(self, futures)
    if point == "confirmed" and pages == 2:
        die()

def dying_publish(self, *arguments):
    global published
    published += 1
    if point == "publishing" and published == 150:
        die()
    return publish(self, *arguments)

async def dying_pages(*arguments):
    served = 0
    async for page in looked(*arguments):
        served += 1
        if point == "read" or (point == "acked" and served == 3):
            die()
        yield page

outbox.wait, outbox.publish, commands._pages = dying_wait, dying_publish, dying_pages
asyncio.run(commands.replay(ConsumerSettings(amqp_url=url, queue_name=queue)))
"""


@pytest.mark.parametrize("point", ["read", "publishing", "sent", "confirmed", "acked"])
async def test_a_replay_that_is_killed_loses_none(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, point: str
) -> None:
    """A replay that is killed half way loses none and a doubled one keeps its id."""
    count = 600
    await dead_letter_many(broker.url, settings.queue_name, count)
    command = [sys.executable, "-c", KILL_SWITCH, point, broker.url, settings.queue_name]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert await asyncio.wait_for(process.wait(), 40) == -signal.SIGKILL
    first = await take_all(broker.url, settings.queue_name)
    every = {f"{n:032x}" for n in range(count)}
    second: list[DeliveredMessage] = []
    deadline = time.monotonic() + 40
    # The broker puts back what the dead process held when it notices the death; a replay ends with what is there.
    while set(ids(first + second)) != every or await waiting(broker.url, dead):
        assert time.monotonic() < deadline, "some are lost"
        assert await commands.replay(settings) == 0
        second += await take_all(broker.url, settings.queue_name)
    assert len(first) < count
    if point in ("publishing", "sent", "confirmed"):
        assert len(first + second) <= count + commands.PAGE_LETTERS
    else:
        assert len(first + second) == count


async def test_a_replay_ends_though_all_is_dead_lettered_again(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, letters: DeadLetters
) -> None:
    """A replay ends although each message is dead lettered again."""
    await dead_letter_many(broker.url, settings.queue_name, 700)
    again = 0

    async with channel(broker.url) as opened:
        await declare(opened, settings.queue_name, QUEUE_ARGUMENTS)
        await opened.basic_qos(prefetch_count=100)

        async def dead_letter_again(found: DeliveredMessage) -> None:
            nonlocal again
            await letters.move(message(found.body, message_id=found.header.properties.message_id), "still bad")
            await opened.basic_ack(found.delivery_tag or 0)
            again += 1

        await opened.basic_consume(settings.queue_name, dead_letter_again)
        assert await asyncio.wait_for(commands.replay(settings), 40) == 0
        await until("all are dead letters again", lambda: again == 700)
    assert len(set(ids(await take_all(broker.url, dead)))) == 700


async def test_a_replay_into_a_full_queue_keeps_the_rest(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay into a queue that refuses stops and keeps the rest."""
    full = {"x-max-length": 10, "x-overflow": "reject-publish"}
    monkeypatch.setattr(commands, "QUEUE_ARGUMENTS", full)
    await dead_letter_many(broker.url, settings.queue_name, 300)
    with pytest.raises(StartupError, match=r"nack.*; moved \d+ of 300, the others are still in"):
        await commands.replay(settings)
    moved = await waiting(broker.url, settings.queue_name)
    assert 10 <= moved < 300
    await until_it_holds(broker.url, dead, 300 - moved)


COMMANDS: list[Callable[[ConsumerSettings], Awaitable[int]]] = [
    commands.show,
    commands.replay,
    lambda settings: commands.export([settings], os.devnull),
]


@pytest.mark.parametrize("command", COMMANDS, ids=["show", "replay", "export"])
async def test_what_is_wrong_with_a_command_is_one_line(
    broker: RabbitMQ, queue_name: str, command: Callable[[ConsumerSettings], Awaitable[int]], nobodys_port: int
) -> None:
    """What is wrong is said in one line and no queue is no dead letters."""

    def at(url: str) -> ConsumerSettings:
        return ConsumerSettings(amqp_url=url, queue_name=queue_name)

    with pytest.raises(StartupError, match=rf"^no broker at amqp://guest:.*:{nobodys_port}/ "):
        await command(at(f"amqp://guest:guest@127.0.0.1:{nobodys_port}/"))
    with pytest.raises(StartupError, match="refused user or password"):
        await command(at(broker.url.replace("guest:guest", "guest:wrong")))
    assert await command(at(broker.url)) == 0


def run(broker: RabbitMQ, queue_name: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "AMQP_URL": broker.url, "QUEUE_NAME": queue_name, **settings}
    command = [sys.executable, str(ROOT / "consumer.py"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


async def test_the_consumers_flags_run_the_commands(
    broker: RabbitMQ, queue_name: str, dead: str, tmp_path: Path
) -> None:
    await dead_letter_many(broker.url, queue_name, 3)
    listed = await asyncio.to_thread(run, broker, queue_name, "--dead-letters")
    assert (listed.returncode, len(listed.stdout.splitlines()), listed.stderr) == (0, 4, "")
    await until_it_holds(broker.url, dead, 3)
    assert (
        await asyncio.to_thread(run, broker, queue_name, "--export-dead-letters", str(tmp_path / "x"))
    ).returncode == 0
    await until_it_holds(broker.url, dead, 3)
    replayed = await asyncio.to_thread(run, broker, queue_name, "--replay-dead-letters")
    assert (replayed.returncode, replayed.stdout) == (0, f"moved 3 of 3 from '{dead}' to '{queue_name}'\n")


@pytest.mark.parametrize("flags", [["--dead-letters"], ["--replay-dead-letters"], ["--export-dead-letters", "-"]])
async def test_where_no_queue_is_the_commands_say_so_and_nothing_else(
    broker: RabbitMQ, queue_name: str, flags: list[str]
) -> None:
    done = await asyncio.to_thread(run, broker, queue_name, *flags)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_without_a_name_starts_no_consumer(broker: RabbitMQ, queue_name: str) -> None:
    done = run(broker, queue_name, "--export-dead-letters", "")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


async def test_an_export_beside_another_reader_is_not_taken_for_whole(
    broker: RabbitMQ, settings: ConsumerSettings, dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await dead_letter_many(broker.url, settings.queue_name, 600)
    look = commands._look
    async with channel(broker.url) as other:

        async def take(_: DeliveredMessage) -> None: ...

        async def late_look(link: Link, arrivals: Any, queue: str, count: int) -> commands.Pages:
            await other.basic_qos(prefetch_count=100)
            await other.basic_consume(dead, take)
            await until_it_holds(broker.url, dead, 500)
            async for page in look(link, arrivals, queue, count):
                yield page

        monkeypatch.setattr(commands, "_look", late_look)
        with pytest.raises(StartupError, match="only 500 of 600 dead letters: another reader"):
            await commands.export([settings], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


async def test_a_reader_that_has_seen_enough_ends_the_list(broker: RabbitMQ, queue_name: str) -> None:
    """A reader that has seen enough ends the list without a word."""
    await dead_letter_many(broker.url, queue_name, 500)
    command = f"{sys.executable} {ROOT}/consumer.py --dead-letters | head -n 1"
    environment = {"PATH": os.environ["PATH"], "AMQP_URL": broker.url, "QUEUE_NAME": queue_name}
    process = await asyncio.create_subprocess_shell(command, env=environment, stdout=-1, stderr=-1)
    out, complaint = await asyncio.wait_for(process.communicate(), 40)
    assert (out[:2], complaint) == (b"ID", b"")


async def test_the_commands_work_on_every_partition(broker: RabbitMQ, queue_name: str) -> None:
    """Or on those that PARTITION names."""
    for partition in range(3):
        await dead_letter_many(broker.url, f"{queue_name}.{partition}", 2)

    def listed(*flags: str, **settings: str) -> list[str]:
        done = run(broker, queue_name, *flags, PARTITIONS="3", **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    exported = [json.loads(line) for line in await asyncio.to_thread(listed, "--export-dead-letters", "-")]
    queues = [entry["headers"]["x-predlog-queue"] for entry in exported]
    assert queues == [f"{queue_name}.{partition}" for partition in (0, 0, 1, 1, 2, 2)]
    for partition in range(3):  # the broker has them back
        await until_it_holds(broker.url, dead_letter_queue(f"{queue_name}.{partition}"), 2)
    await asyncio.to_thread(listed, "--replay-dead-letters", PARTITION="1-2")
    for partition, left in enumerate((2, 0, 0)):
        await until_it_holds(broker.url, dead_letter_queue(f"{queue_name}.{partition}"), left)
        if not left:
            await until_it_holds(broker.url, f"{queue_name}.{partition}", 2)
