"""Trouble with the disk, the broker and the network: both processes report it, lose and duplicate nothing, and recover.

They are real processes under a steady load. At the end, every answer is compared with the CSV.
"""

import asyncio
import contextlib
import copy
import functools
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aiormq
import pytest

from scripts.load.checker import Verdict, check
from scripts.load.client import Target
from scripts.load.events import Events
from scripts.load.generator import Load
from scripts.load.verify import opened
from scripts.rabbitmq import free_port
from tests.chaos.stage import LoadThread
from tests.conftest import Service, Start
from tests.integration.test_contract import EVENT, call
from tests.proxy import Proxy
from tests.rabbitmq import RabbitMQ
from tests.support import polling
from tests.support.polling import wait_until

RECOVERY_SECONDS = 40.0  # a few are needed; the rest is for a busy machine
HEARTBEAT = "?heartbeat=1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the load of minutes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small file system; the limit on the file's size is tested anyway")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def filled(disk: Path) -> Path:
    """The file that takes all the space that was left."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 65536):
            pass
    return filler


class Traffic:
    """A steady load, and what must have become of it."""

    def __init__(self, producer: Service, csv: Path, rate: float = 200) -> None:
        self.events = Events(seed=time.time_ns() % 10**9)
        self.load = Load(Target.parse(producer.url), self.events, concurrency=8, retries=True, rate=rate)
        self.csv = csv
        self._thread = LoadThread(self.load)

    @property
    def accepted(self) -> int:
        return self.load.ledger.accepted_events

    def wait_for_more(self, count: int = 50) -> None:
        """Wait until this many more events are accepted."""
        wanted = self.accepted + count
        until("events are accepted", lambda: self.accepted >= wanted)

    def end(self) -> None:
        self._thread.finish(now=True)

    def assert_exactly_once(self) -> None:
        """End the load; check that every accepted event gets to the CSV, once."""
        self.end()
        until("every accepted event is in the CSV", lambda: not self._verdict().lost.count)
        assert self.accepted == len(self.load.ledger)
        assert self._verdict().holds, str(self._verdict())

    def _verdict(self) -> Verdict:
        return check(self.events, self.load.ledger, opened(self.csv))


until = functools.partial(wait_until, timeout_seconds=RECOVERY_SECONDS)


def until_not_ready(service: Service, reason: str) -> None:
    until(f"{service.name} says {reason!r}", lambda: reason in service.not_ready())


def until_ready(*services: Service) -> None:
    for service in services:
        until(f"{service.name} is ready", service.is_ready)


def until_lost(service: Service, connections: int) -> None:
    lost = functools.partial(service.metric, "predlog_amqp_reconnects_total")
    until(f"{service.name} has lost {connections} connections", lambda: lost() == connections)


def limit_file_size(service: Service, size_bytes: int) -> None:
    """Let writes beyond it fail, the one that crosses it in its middle. Leave some room for the service's log."""
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def messages(node: RabbitMQ, queue_name: str) -> int:
    """Count the messages in the queue. The broker counts those of quorum queues every five seconds."""
    return int(node.eval(f"{the_queue(queue_name)}, [{{_, N}}] = rabbit_amqqueue:info(Queue, [messages]), N"))


def the_queue(name: str) -> str:
    """Return the beginning of an Erlang expression: `Queue` is the queue of that name."""
    return f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{name}">>))'


def test_a_standby_takes_over_within_seconds_of_a_kill(producer: Start, consumer: Start) -> None:
    active, standby = consumer(), consumer(wait=False)
    traffic = Traffic(producer(), active.csv_file)
    until_not_ready(standby, "standby")
    standby.process.send_signal(signal.SIGHUP)  # logrotate tells everyone
    traffic.wait_for_more()
    active.kill()
    killed = time.monotonic()
    until_ready(standby)
    assert time.monotonic() - killed < 15, "no time-out of the broker's was waited for"
    traffic.wait_for_more()
    traffic.assert_exactly_once()


def test_a_full_disk_is_reported_and_waited_out(small_disk: Path, producer: Start, consumer: Start) -> None:
    csv = small_disk / "data.csv"
    storing = consumer(CSV_FILE=csv)
    traffic = Traffic(producer(), csv)
    traffic.wait_for_more()
    filler = filled(small_disk)
    until_not_ready(storing, "No space left on device")
    traffic.wait_for_more()
    until("it is measured", lambda: storing.metric("predlog_store_ok") == 0)
    until("it has the events", lambda: storing.metric("predlog_unacked") >= 5)
    assert storing.log().count("cannot store") == 1
    filler.unlink()
    until_ready(storing)
    traffic.assert_exactly_once()


def test_a_start_on_a_full_disk_is_logged_once_and_waited_out(
    small_disk: Path, producer: Start, consumer: Start
) -> None:
    csv = small_disk / "data.csv"
    traffic = Traffic(producer(), csv)
    traffic.wait_for_more()
    filler = filled(small_disk)
    starting = consumer(CSV_FILE=csv, wait=False)
    until("the trouble is logged", lambda: "cannot store" in starting.log())
    until_not_ready(starting, "No space left on device; free some space")
    traffic.wait_for_more()
    filler.unlink()
    until_ready(starting)
    assert starting.log().count("cannot store") == 1
    traffic.assert_exactly_once()


def test_a_stop_ends_the_wait_for_a_disk_that_is_full(small_disk: Path, consumer: Start) -> None:
    filled(small_disk)
    starting = consumer(CSV_FILE=small_disk / "data.csv", wait=False)
    until("the trouble is logged", lambda: "cannot store" in starting.log())
    starting.process.send_signal(signal.SIGTERM)
    assert starting.process.wait(10) == 0


def test_while_nothing_can_be_stored_nothing_is_acked(
    producer: Start, consumer: Start, broker: RabbitMQ, queue_name: str
) -> None:
    storing = consumer()
    traffic = Traffic(producer(), storing.csv_file)
    traffic.wait_for_more()
    limit_file_size(storing, storing.csv_file.stat().st_size)
    until_not_ready(storing, "File too large")
    traffic.wait_for_more()
    traffic.end()
    stored = storing.metric("predlog_rows_total")
    committed = storing.csv_file.read_bytes()
    assert committed.endswith(b"\r\n")
    kept = "the broker keeps all that the consumer has"
    until(kept, lambda: messages(broker, queue_name) == storing.metric("predlog_unacked") >= 5)
    assert storing.metric("predlog_rows_total") == stored
    limit_file_size(storing, resource.RLIM_INFINITY)
    until_ready(storing)
    traffic.assert_exactly_once()
    assert storing.csv_file.read_bytes().startswith(committed)


def test_an_event_too_large_for_the_broker_disturbs_no_other(producer: Start, consumer: Start, node: RabbitMQ) -> None:
    limit = "application:set_env(rabbit, max_message_size, {0}), persistent_term:put(max_message_size, {0})"
    node.eval(limit.format(100_000))
    try:
        posting, storing = producer(AMQP_URL=node.url), consumer(AMQP_URL=node.url)
        traffic = Traffic(posting, storing.csv_file)
        traffic.wait_for_more()
        large = json.dumps({**EVENT, "client_id": "x" * 200_000}).encode()
        status, _, detail = call(posting, "POST", "/process", large)
        assert status == 413
        assert "100000" in detail["detail"]
        until_ready(posting)
        lost = posting.metric("predlog_amqp_reconnects_total")
        for _ in range(5):
            assert call(posting, "POST", "/process", large)[0] == 413
        rowless = json.dumps({**EVENT, "data": {"license_id": "l", "preds": []}}).encode()
        batch = b"[%b,%b]" % (large, rowless)
        together = call(posting, "POST", "/process/batch", batch)[2]
        assert [result["status"] for result in together["results"]] == [413, 200]
        assert posting.metric("predlog_amqp_reconnects_total") == lost
        traffic.wait_for_more()
        traffic.assert_exactly_once()
    finally:
        node.eval(limit.format(134_217_728))


def test_a_new_connection_takes_nothing_during_disk_trouble(producer: Start, consumer: Start, node: RabbitMQ) -> None:
    posting, storing = producer(AMQP_URL=node.url), consumer(AMQP_URL=node.url)
    traffic = Traffic(posting, storing.csv_file)
    traffic.wait_for_more()
    limit_file_size(storing, storing.csv_file.stat().st_size)
    until_not_ready(storing, "File too large")
    node.close_connections()
    until("the connection is lost", lambda: storing.metric("predlog_amqp_reconnects_total") == 1)
    traffic.wait_for_more()
    deliveries = storing.metric("predlog_deliveries_total")
    traffic.wait_for_more()
    assert storing.metric("predlog_deliveries_total") == deliveries
    limit_file_size(storing, resource.RLIM_INFINITY)
    until_ready(storing)
    traffic.assert_exactly_once()


def test_a_killed_broker_keeps_what_it_confirmed(producer: Start, consumer: Start, node: RabbitMQ) -> None:
    posting, storing = producer(AMQP_URL=node.url), consumer(AMQP_URL=node.url)
    node.sync_new_queues()
    traffic = Traffic(posting, storing.csv_file)
    traffic.wait_for_more()
    node.kill()
    until_not_ready(posting, "no broker")
    until_not_ready(storing, "no broker")
    node.start()
    until_ready(posting, storing)
    traffic.wait_for_more()
    traffic.assert_exactly_once()


def test_a_silent_broker_is_left_and_found_again(producer: Start, consumer: Start, node: RabbitMQ) -> None:
    """It is silent for longer than the heartbeat."""
    posting, storing = producer(AMQP_URL=node.url + HEARTBEAT), consumer(AMQP_URL=node.url + HEARTBEAT)
    traffic = Traffic(posting, storing.csv_file)
    traffic.wait_for_more()
    node.pause()
    until_not_ready(posting, "no broker")
    until_not_ready(storing, "no broker")
    node.resume()
    until_ready(posting, storing)
    traffic.wait_for_more()
    traffic.assert_exactly_once()


async def test_no_200_after_the_end_of_a_drain_is_a_lie(producer: Start, broker: RabbitMQ) -> None:
    """Late confirms of events that were answered 504 confirm no event that was published after them."""
    event = json.dumps(EVENT).encode()
    request = b"POST /process HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(event), event)
    async with Proxy(broker.port) as proxy:
        posting = producer(wait=False, AMQP_URL=proxy.url, SHUTDOWN_TIMEOUT_MS=1500, EVENTS_PER_MESSAGE=1)
        await asyncio.to_thread(posting.wait_until_ready)
        proxy.answers_pass.clear()
        host, port = posting.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(64 * request)
        enough = proxy.forwarded_bytes + 32 * len(event)  # the others wait in the parser
        await polling.until("32 events are on their way", lambda: proxy.forwarded_bytes > enough)
        proxy.drops = True
        posting.process.terminate()
        answers = asyncio.create_task(reader.read())
        await polling.until("it publishes more, or ends", lambda: proxy.dropped_bytes > 200 or answers.done())
        proxy.answers_pass.set()
        statuses = re.findall(rb"HTTP/1.1 (\d+)", await answers)
        writer.close()
        assert statuses.count(b"504") == 32
        assert set(statuses) <= {b"503", b"504"}, "what was sent after SIGTERM never reached the broker"
        assert await asyncio.to_thread(posting.process.wait, 20) == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_health_port_answers_until_the_end(producer: Start, broker: RabbitMQ, workers: int) -> None:
    async with Proxy(broker.port) as proxy:
        port = free_port()
        posting = producer(wait=False, AMQP_URL=proxy.url, HEALTH_PORT=port, SHUTDOWN_TIMEOUT_MS=5000, WORKERS=workers)
        health = copy.copy(posting)
        health.url = f"http://127.0.0.1:{port}"
        await polling.until("the health port is ready", lambda: asyncio.to_thread(health.is_ready))
        await polling.until("all listen", lambda: posting.log().count("POST to") == workers)
        await polling.until("all are connected", lambda: posting.log().count("connected to") == workers)
        proxy.answers_pass.clear()
        answer = asyncio.create_task(asyncio.to_thread(call, posting, "POST", "/process", json.dumps(EVENT).encode()))
        await polling.until("an event waits", lambda: asyncio.to_thread(health.metric, "predlog_unconfirmed"))
        posting.process.terminate()
        await polling.until("all stop", lambda: posting.log().count("stopping") == workers)
        assert await asyncio.to_thread(health.not_ready) == "the server is shutting down"
        await polling.until("it has stopped listening", lambda: asyncio.to_thread(posting.not_ready))
        assert (await asyncio.to_thread(call, health, "GET", "/healthz"))[0] == 200
        proxy.answers_pass.set()
        assert (await answer)[0] == 200
        assert await asyncio.to_thread(posting.process.wait, 20) == 0


async def test_secrets_in_files_are_read_again_on_sighup(producer: Start, broker: RabbitMQ, tmp_path: Path) -> None:
    """New tokens count at once, a new AMQP_URL from the next connection on. A bad file changes nothing."""
    event, token_file, url_file = json.dumps(EVENT).encode(), tmp_path / "token", tmp_path / "url"

    async def status(token: str) -> int:
        return (await asyncio.to_thread(call, posting, "POST", "/process", event, Authorization=f"Bearer {token}"))[0]

    async with Proxy(broker.port) as old, Proxy(broker.port) as new:
        token_file.write_text("one\n")
        url_file.write_text(old.url)
        posting = producer(wait=False, AMQP_URL="", API_TOKEN_FILE=token_file, AMQP_URL_FILE=url_file)
        await asyncio.to_thread(posting.wait_until_ready)
        assert [await status("one"), await status("two")] == [200, 401]
        token_file.write_text("two\n")
        url_file.write_text(new.url)
        posting.process.send_signal(signal.SIGHUP)

        async def is_known() -> bool:
            return await status("two") == 200

        await polling.until("the new token is known", is_known)
        assert await status("one") == 401
        token_file.write_text("")
        posting.process.send_signal(signal.SIGHUP)
        await polling.until("the fault is logged", lambda: "the old secrets stay" in posting.log())
        await old.close()
        await polling.until("it has another connection", lambda: str(new.port) in posting.log())
        await polling.until("events are accepted", is_known)


def test_a_memory_alarm_refuses_events_until_it_ends(producer: Start, consumer: Start, node: RabbitMQ) -> None:
    posting, storing = producer(AMQP_URL=node.url), consumer(AMQP_URL=node.url)
    traffic = Traffic(posting, storing.csv_file)
    traffic.wait_for_more()
    with node.memory_alarm():
        until_not_ready(posting, "low on memory")
        until("events are refused", lambda: traffic.load.ledger.answers[503] > 0)
        until_ready(storing)  # what is in the queue can be taken out
    until_ready(posting)
    traffic.wait_for_more()
    traffic.assert_exactly_once()


def test_a_deleted_queue_is_declared_again_by_both(
    producer: Start, consumer: Start, node: RabbitMQ, queue_name: str
) -> None:
    """It is deleted while the consumer is connected."""
    posting, storing = producer(AMQP_URL=node.url), consumer(AMQP_URL=node.url)
    node.eval(f'{the_queue(queue_name)}, rabbit_amqqueue:delete(Queue, false, false, <<"test">>)')
    traffic = Traffic(posting, storing.csv_file)
    traffic.wait_for_more()
    until_ready(posting, storing)
    traffic.assert_exactly_once()


def test_connections_closed_by_the_broker_come_back(producer: Start, consumer: Start, node: RabbitMQ) -> None:
    posting, storing = producer(AMQP_URL=node.url), consumer(AMQP_URL=node.url)
    traffic = Traffic(posting, storing.csv_file)
    for number in (1, 2):
        traffic.wait_for_more()
        node.close_connections()
        for service in (posting, storing):
            until_lost(service, number)
        until_ready(posting, storing)
    traffic.assert_exactly_once()
    assert storing.metric("predlog_amqp_reconnects_total") == 2
    assert posting.metric("predlog_amqp_reconnects_total") == 2


@pytest.fixture
def impatient_node(node: RabbitMQ) -> Iterator[RabbitMQ]:
    """A broker that ends a consumer whose messages are unacked for a second; the default is half an hour."""
    limits = "application:set_env(rabbit, consumer_timeout, {}), application:set_env(rabbit, channel_tick_interval, {})"
    node.eval(limits.format(1000, 300))
    yield node
    node.eval(limits.format(1_800_000, 60_000))


def test_a_consumer_that_the_broker_ends_comes_back(producer: Start, consumer: Start, impatient_node: RabbitMQ) -> None:
    posting, storing = producer(AMQP_URL=impatient_node.url), consumer(AMQP_URL=impatient_node.url)
    traffic = Traffic(posting, storing.csv_file)
    traffic.wait_for_more()
    limit_file_size(storing, storing.csv_file.stat().st_size)
    until("the broker loses patience", lambda: storing.metric("predlog_amqp_reconnects_total") > 0)
    assert re.search("closed: PRECONDITION_FAILED|the broker cancelled the consumer", storing.log())  # the latter: 4.3
    limit_file_size(storing, resource.RLIM_INFINITY)
    until_ready(storing)
    traffic.assert_exactly_once()


def test_a_flush_interval_beyond_consumer_timeout_stores(
    producer: Start, consumer: Start, impatient_node: RabbitMQ
) -> None:
    """FLUSH_INTERVAL_MS is longer than consumer_timeout. There are rows, and no endless 406."""
    posting = producer(AMQP_URL=impatient_node.url)
    storing = consumer(AMQP_URL=impatient_node.url, FLUSH_INTERVAL_MS=9000)
    assert call(posting, "POST", "/process", json.dumps(EVENT).encode(), Content_Type="application/json")[0] == 200
    until("the row is stored", lambda: storing.metric("predlog_rows_total") > 0)
    assert storing.metric("predlog_amqp_reconnects_total") == 0


def test_fifty_reconnects_drop_and_dead_letter_no_message(
    producer: Start, consumer: Start, broker: RabbitMQ, queue_name: str
) -> None:
    """Each reconnect is with a full prefetch."""
    traffic = Traffic(producer(EVENTS_PER_MESSAGE=1), Path())
    traffic.wait_for_more(100)
    traffic.end()

    async def take_all_and_go() -> None:
        connection = await aiormq.connect(broker.url)
        channel = await connection.channel()
        await channel.basic_qos(prefetch_count=100)
        taken = asyncio.Semaphore(0)

        async def take(_: object) -> None:
            taken.release()

        await channel.basic_consume(queue_name, take)
        for _ in range(100):
            await taken.acquire()
        await connection.close()

    async def reconnect_often() -> None:
        for _ in range(50):
            async with asyncio.timeout(30):
                await take_all_and_go()

    asyncio.run(reconnect_often())
    storing = consumer()
    traffic.csv = storing.csv_file
    traffic.assert_exactly_once()
    assert not Path(f"{storing.csv_file}.dead-letters").exists()
    assert storing.metric("predlog_redeliveries_total") >= 100
