"""One connection kept up for ever: cut, cancelled or refused at any moment, it comes back or ends, and never hangs."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiormq
import pytest

from common.amqp import lane
from common.amqp import link as link_module
from common.amqp.codec import PublishEncoder, packed_seconds
from common.amqp.link import CALL_TIMEOUT_SECONDS, Link, keep_up
from common.amqp.topology import QUEUE_ARGUMENTS, declare
from common.errors import StartupError
from scripts.rabbitmq import free_port
from tests.proxy import Proxy
from tests.rabbitmq import RabbitMQ
from tests.support.lane import Heard
from tests.support.polling import until

AT_ONCE = 8  # connections kept up side by side


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between attempts, and no account of aiormq's, as in production."""
    monkeypatch.setattr(link_module, "BACKOFF_FIRST_SECONDS", 0.0)
    for name in ("aiormq", "aiormq.connection", "aiormq.channel"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.CRITICAL)


async def ignore(_: object) -> None: ...


class Kept(Heard):
    """A connection kept up, set up as the consumer's is."""

    def __init__(self, url: str, queue_name: str) -> None:
        super().__init__()
        self.connected = asyncio.Event()
        self._queue_name = queue_name
        self._link: Link | None = None
        self.task = asyncio.create_task(keep_up(url, "test", self))

    async def up(self, link: Link) -> None:
        await declare(link.channel, self._queue_name, QUEUE_ARGUMENTS)
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            await link.channel.basic_qos(prefetch_count=10)
            await link.channel.basic_consume(self._queue_name, ignore)
        self._link = link
        self.connected.set()

    def down(self, reason: str) -> None:
        self.connected.clear()
        self.downs.append(reason)

    async def until_connected_through(self, proxy: Proxy) -> None:
        """Until it is connected and all cuts are behind it; raises what keep_up raised."""
        while proxy.cuts or not self.connected.is_set() or self._link is None or self._link.lane.lost is not None:
            if self.task.done():
                self.task.result()
            await asyncio.sleep(0.005)

    async def end(self) -> None:
        self.task.cancel()
        done, _ = await asyncio.wait({self.task}, timeout=5)
        assert done, "a cancelled keep_up goes on"


@asynccontextmanager
async def kept(url: str, queue_name: str) -> AsyncIterator[Kept]:
    one = Kept(url, queue_name)
    try:
        yield one
    finally:
        await one.end()


async def set_up_bytes(broker: RabbitMQ, queue_name: str) -> int:
    """What the broker says from the first byte of the handshake to the last of the set-up."""
    async with Proxy(broker.port) as proxy, kept(proxy.url, queue_name) as one:
        await one.until_connected_through(proxy)
        return proxy.passed_bytes


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_cut_at_any_byte_of_the_set_up_it_ends_connected(broker: RabbitMQ, queue_name: str, reset: bool) -> None:
    """Cut at any byte of the first handshake and set up it ends connected."""
    total = await set_up_bytes(broker, queue_name)

    async def through_every(first: int) -> None:
        async with Proxy(broker.port, reset) as proxy:
            # From the end to the start of the list the place grows: until the last one, no set-up was ever complete,
            # so that each cut is one of those after which keep_up may give up.
            proxy.cuts = list(range(first, total + 1, AT_ONCE))[::-1]
            async with kept(proxy.url, queue_name) as one:
                await one.until_connected_through(proxy)

    async with asyncio.timeout(200), asyncio.TaskGroup() as group:
        for first in range(AT_ONCE):
            group.create_task(through_every(first))


async def test_cancelled_at_any_turn_of_the_loop_after_a_cut_it_ends(
    broker: RabbitMQ, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends, and asyncio has nothing to log about a task whose exception nobody looked at."""
    total = await set_up_bytes(broker, queue_name)
    for place in range(10):
        for turns in range(20):
            async with Proxy(broker.port, reset=turns % 2 == 1) as proxy:
                proxy.cuts = [total * place // 9]
                async with kept(proxy.url, queue_name) as one:
                    await proxy.cut.wait()
                    for _ in range(turns):
                        await asyncio.sleep(0)
                assert one.task.cancelled()
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_cancelled_at_any_turn_after_a_loss_in_a_call_it_ends(broker: RabbitMQ, queue_name: str) -> None:
    """Cancelled at any turn of the loop after a loss during a call it ends."""
    async with Proxy(broker.port) as proxy:
        for turns in range(30):
            proxy.silent = False
            entered = asyncio.get_running_loop().create_future()

            class Declaring(Heard):
                async def up(self, link: Link, entered: asyncio.Future[Link] = entered) -> None:
                    proxy.silent = True
                    entered.set_result(link)
                    await declare(link.channel, queue_name, QUEUE_ARGUMENTS)

            task = asyncio.create_task(keep_up(proxy.url, "test", Declaring()))
            link = await entered
            await asyncio.sleep(0.005)  # the call is under way; nothing tells when
            assert link.lane._lane_transport is not None
            link.lane._lane_transport.abort()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done, f"cancelled {turns} turns after the loss, it goes on"
            assert task.cancelled()


@pytest.mark.parametrize("key", ["cafile", "certfile"])
async def test_a_missing_certificate_file_is_one_line_that_names_it(key: str, queue_name: str) -> None:
    url = f"amqps://guest:guest@127.0.0.1:{free_port()}/?{key}=/no/such.pem"
    with pytest.raises(StartupError, match=r"AMQP_URL .*/no/such\.pem"):
        async with asyncio.timeout(5), kept(url, queue_name) as one:
            await one.task


async def test_a_refused_port_is_waited_for_and_said_once(
    broker: RabbitMQ, queue_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0
    open_link = link_module.open_link

    async def counted(*arguments: Any) -> Link:
        nonlocal attempts
        attempts += 1
        return await open_link(*arguments)

    monkeypatch.setattr(link_module, "open_link", counted)
    caplog.set_level(logging.INFO, "predlog.amqp")
    proxy = Proxy(broker.port)
    proxy.port = free_port()
    async with asyncio.timeout(20), kept(proxy.url, queue_name) as one:
        while attempts < 5:
            await asyncio.sleep(0.005)
        [refused] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"127.0.0.1:{proxy.port}" in refused
        assert "guest:guest" not in refused
        await proxy.listen(proxy.port)
        await one.until_connected_through(proxy)
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
        assert set(one.downs) == {refused.removeprefix("test: ")}, "each failed attempt says why"
    await proxy.close()


# Several hosts


class Hosts:
    """Two hosts that never answer, one that refuses, and a broker behind a proxy that may be cut."""

    def __init__(self, broker: RabbitMQ) -> None:
        self.proxy = Proxy(broker.port)
        self._frozen: asyncio.Server | None = None
        self._black_hole = socket.socket()
        self._fillers = [socket.socket() for _ in range(4)]

    async def __aenter__(self) -> Hosts:
        async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        self._frozen = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
        self._black_hole.bind(("127.0.0.1", 0))
        self._black_hole.listen(0)  # once its queue is full, Linux answers no SYN
        for filler in self._fillers:
            filler.setblocking(False)
            filler.connect_ex(self._black_hole.getsockname())
        await self.proxy.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.proxy.close()
        assert self._frozen is not None
        self._frozen.close()
        for each in (self._black_hole, *self._fillers):
            each.close()

    @property
    def url(self) -> str:
        assert self._frozen is not None
        ports = [self._frozen.sockets[0].getsockname()[1], self._black_hole.getsockname()[1], free_port()]
        hosts = ",".join(f"127.0.0.1:{port}" for port in [*ports, self.proxy.port])
        return f"amqp://guest:guest@{hosts}/"


async def test_hosts_that_never_answer_delay_no_connection(
    broker: RabbitMQ, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is tried while they are silent: their time-outs, here minutes, do not add up."""
    monkeypatch.setattr(link_module, "STAGGER_SECONDS", 0.1)
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_SECONDS", 300)
    monkeypatch.setattr(lane, "CONNECT_TIMEOUT_SECONDS", 300)
    async with asyncio.timeout(30), Hosts(broker) as hosts, kept(hosts.url, queue_name) as one:
        for _ in range(5):
            await one.until_connected_through(hosts.proxy)
            assert one._link is not None
            one._link.lane.fail("cut by the test")
            await until("it is down", lambda: not one.connected.is_set())
        assert len(asyncio.all_tasks()) < 60, "what lost the race is over"


async def test_a_name_that_is_not_resolved_delays_no_connection(
    broker: RabbitMQ, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a dead container, for example. Its look-up is one for all: uvloop has two threads for them."""
    loop = asyncio.get_running_loop()
    getaddrinfo, answered = loop.getaddrinfo, asyncio.Event()
    lookups = 0

    async def look_up(host: str, port: int, **more: Any) -> Any:
        nonlocal lookups
        if host == "silent.test":
            lookups += 1
            await answered.wait()
        return await getaddrinfo("127.0.0.1", port, **more)

    monkeypatch.setattr(loop, "getaddrinfo", look_up)
    monkeypatch.setattr(link_module, "STAGGER_SECONDS", 0.05)
    monkeypatch.setattr(link_module, "RESOLVE_TIMEOUT_SECONDS", 300)
    async with asyncio.timeout(30), Proxy(broker.port) as proxy:
        hosts = f"silent.test:{proxy.port},127.0.0.1:{proxy.port}"
        async with kept(f"amqp://guest:guest@{hosts}/", queue_name) as one:
            for _ in range(3):
                await one.until_connected_through(proxy)
                assert one._link is not None
                one._link.lane.fail("cut by the test")
                await until("it is down", lambda: not one.connected.is_set())
        assert lookups == 1
        late = asyncio.create_task(
            link_module.open_link(f"amqp://guest:guest@silent.test:{proxy.port},127.0.0.1:{free_port()}/", "t", Heard())
        )
        await asyncio.wait({late}, timeout=0.2)
        answered.set()
        await (await late).close()  # the others refused before it was found
        assert lookups == 1


async def test_a_host_that_is_gone_says_so_within_its_bounds(
    broker: RabbitMQ, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(lane, "CONNECT_TIMEOUT_SECONDS", 0.2)
    async with asyncio.timeout(30), Hosts(broker) as hosts:
        await hosts.proxy.close()
        with pytest.raises(link_module.CONNECTION_ERRORS) as error:
            await link_module.open_link(hosts.url, "test", Heard())
        assert "guest:guest" not in link_module.explain(error.value, hosts.url)


async def test_cancelling_closes_the_connection_in_order(broker: RabbitMQ, queue_name: str) -> None:
    """What was sent last, an ack perhaps, arrives."""
    async with asyncio.timeout(30), kept(broker.url, queue_name) as one:
        await one.connected.wait()
        assert one._link is not None
        for _ in range(10):  # until it waits for nothing but the loss
            await asyncio.sleep(0)
        encoder = PublishEncoder(queue_name, one._link.frame_max)
        one._link.lane.send(encoder.encode(b"last", b"m" * 32, packed_seconds(0)))
    async with asyncio.timeout(20), aiormq.connect(broker.url) as other:
        channel = await other.channel()
        while (await channel.queue_declare(queue_name, passive=True)).message_count != 1:
            await asyncio.sleep(0.02)  # until what was delivered to us is back
