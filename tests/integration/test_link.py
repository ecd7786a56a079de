"""One connection kept up forever: cut, cancelled or refused at any moment, it comes back or ends, and never hangs."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiormq
import pytest
import trustme

from common.amqp import lane
from common.amqp import link as link_module
from common.amqp.codec import PublishEncoder, packed_seconds
from common.amqp.link import CALL_TIMEOUT_SECONDS, Link, NoLink, keep_up, open_link
from common.amqp.topology import QUEUE_ARGUMENTS, begin_publishing, declare
from common.errors import StartupError
from scripts.rabbitmq import free_port
from tests.proxy import Proxy
from tests.rabbitmq import RabbitMQ
from tests.support.lane import Heard
from tests.support.polling import until

AT_ONCE = 8  # connections kept up side by side


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make no pause between attempts, and drop aiormq's log, as in production."""
    monkeypatch.setattr(link_module, "BACKOFF_FIRST_SECONDS", 0.0)
    for name in ("aiormq", "aiormq.connection", "aiormq.channel"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.CRITICAL)


async def ignore(_: object) -> None: ...


class Kept(Heard):
    """A connection kept up, set up as the consumer's is."""

    def __init__(self, url: Callable[[], str], queue_name: str) -> None:
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
        """Wait until it is connected and no cut is left; raise what keep_up raised."""
        while proxy.cuts or not self.connected.is_set() or self._link is None or self._link.lane.lost is not None:
            if self.task.done():
                self.task.result()
            await asyncio.sleep(0.005)

    async def end(self) -> None:
        self.task.cancel()
        done, _ = await asyncio.wait({self.task}, timeout=5)
        assert done, "a cancelled keep_up continues"


@asynccontextmanager
async def kept(url: str, queue_name: str) -> AsyncIterator[Kept]:
    one = Kept(lambda: url, queue_name)
    try:
        yield one
    finally:
        await one.end()


async def set_up_bytes(broker: RabbitMQ, queue_name: str) -> int:
    """Count what the broker sends from the first byte of the handshake to the last of the set-up."""
    async with Proxy(broker.port) as proxy, kept(proxy.url, queue_name) as one:
        await one.until_connected_through(proxy)
        return proxy.passed_bytes


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_cut_at_any_byte_of_the_set_up_it_ends_connected(broker: RabbitMQ, queue_name: str, reset: bool) -> None:
    total = await set_up_bytes(broker, queue_name)

    async def through_every(first: int) -> None:
        async with Proxy(broker.port, reset) as proxy:
            # From the end to the start of the list the place grows: until the last one, no set-up was ever complete,
            # so that each cut is one of those after which keep_up can give up.
            proxy.cuts = list(range(first, total + 1, AT_ONCE))[::-1]
            async with kept(proxy.url, queue_name) as one:
                await one.until_connected_through(proxy)

    async with asyncio.timeout(200), asyncio.TaskGroup() as group:
        for first in range(AT_ONCE):
            group.create_task(through_every(first))


async def test_cancelled_at_any_turn_of_the_loop_after_a_cut_it_ends(
    broker: RabbitMQ, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio has nothing to log about a task whose exception nobody looked at."""
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
    async with Proxy(broker.port) as proxy:
        for turns in range(30):
            proxy.silent = False
            entered = asyncio.get_running_loop().create_future()

            class Declaring(Heard):
                async def up(self, link: Link, entered: asyncio.Future[Link] = entered) -> None:
                    proxy.silent = True
                    entered.set_result(link)
                    await declare(link.channel, queue_name, QUEUE_ARGUMENTS)

            task = asyncio.create_task(keep_up(lambda: proxy.url, "test", Declaring()))
            link = await entered
            await asyncio.sleep(0.005)  # the call is under way; nothing tells when
            assert link.lane._lane_transport is not None
            link.lane._lane_transport.abort()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done, f"cancelled {turns} turns after the loss, it continues"
            assert task.cancelled()


@pytest.mark.parametrize("key", ["cafile", "certfile"])
async def test_a_missing_certificate_file_is_one_line_that_names_it(key: str, queue_name: str) -> None:
    url = f"amqps://guest:guest@127.0.0.1:{free_port()}/?{key}=/no/such.pem"
    with pytest.raises(StartupError, match=r"AMQP_URL .*/no/such\.pem"):
        async with asyncio.timeout(5), kept(url, queue_name) as one:
            await one.task


async def test_a_refused_port_is_waited_for_and_logged_once(
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
        levels = [logging.WARNING, logging.INFO]
        await until("it is logged", lambda: [record.levelno for record in caplog.records] == levels)
        assert set(one.downs) == {refused.removeprefix("test: ")}, "each failed attempt says why"
    await proxy.close()


# Several hosts


class Hosts:
    """Two hosts that never answer, one that refuses, and a broker behind a proxy that can be cut."""

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


def bound(monkeypatch: pytest.MonkeyPatch, tcp_seconds: float, handshake_seconds: float) -> None:
    for module in (link_module, lane):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_SECONDS", tcp_seconds)
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_SECONDS", handshake_seconds)


async def test_hosts_that_never_answer_delay_within_bounds(
    broker: RabbitMQ, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(monkeypatch, 0.1, 1.0)
    async with asyncio.timeout(30), Hosts(broker) as hosts, kept(hosts.url, queue_name) as one:
        for _ in range(5):
            await one.until_connected_through(hosts.proxy)
            assert one._link is not None
            one._link.lane.fail("cut by the test")
            await until("it is down", lambda: not one.connected.is_set())


async def test_hosts_that_are_all_gone_are_one_line(broker: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, 0.1, 0.3)
    async with asyncio.timeout(30), Hosts(broker) as hosts:
        await hosts.proxy.close()
        with pytest.raises(NoLink, match=r"127\.0\.0\.1") as error:
            await open_link(hosts.url, "test", Heard())
        assert "guest:guest" not in str(error.value)


async def test_an_unresolvable_name_delays_within_bounds(
    broker: RabbitMQ, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example is the name of a dead container. All share one look-up, since uvloop has two threads for them."""
    bound(monkeypatch, 0.1, 5.0)
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
    async with asyncio.timeout(30), Proxy(broker.port) as proxy:
        hosts = f"silent.test:{proxy.port},silent.test:{free_port()},127.0.0.1:{proxy.port}"
        async with kept(f"amqp://guest:guest@{hosts}/", queue_name) as one:
            for _ in range(3):
                await one.until_connected_through(proxy)
                assert one._link is not None
                one._link.lane.fail("cut by the test")
                await until("it is down", lambda: not one.connected.is_set())
        assert lookups == 1
        answered.set()
        await asyncio.sleep(0)
        link = await open_link(f"amqp://guest:guest@silent.test:{proxy.port}/", "test", Heard())
        await link.close()


class Peer:
    """A server that is not a broker. It counts its clients."""

    def __init__(self, answer: bytes = b"", tls: ssl.SSLContext | None = None) -> None:
        self.clients = 0
        self._answer = answer
        self._tls = tls

    async def __aenter__(self) -> Peer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        writer.write(self._answer)
        writer.close()


@pytest.mark.parametrize("answer", [b"", b"\0", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x01\0\0\0\0\0\4\0\0\0\0\xce"])
async def test_a_peer_that_is_not_a_broker_is_logged_and_waited_for(
    answer: bytes, broker: RabbitMQ, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """HAProxy without a live backend accepts and closes. With two hosts in turn, it is still not a line each time."""
    caplog.set_level(logging.INFO)
    async with asyncio.timeout(30), Peer(answer) as first, Peer(answer) as second, Proxy(broker.port) as proxy:
        ports = first.port, second.port
        urls = [f"amqp://guest:guest@{','.join(f'127.0.0.1:{port}' for port in ports)}/"]
        one = Kept(lambda: urls[-1], queue_name)
        await until("ten were met", lambda: first.clients + second.clients > 10)
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert 1 <= len(said) <= 2, said
        assert all(str(first.port) in line and "\n" not in line for line in said)
        assert not any(record.exc_info for record in caplog.records)
        urls.append(proxy.url)  # as after a reload of the setting
        await one.until_connected_through(proxy)
        await one.end()


async def test_a_bug_of_our_own_is_named_with_its_traceback(
    broker: RabbitMQ, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Heard):
        async def up(self, link: Link) -> None:
            raise KeyError("a fault of our own")

    caplog.set_level(logging.DEBUG, "predlog.amqp")
    task = asyncio.create_task(keep_up(lambda: broker.url, "test", faulty := Faulty()))
    await until("it failed twice", lambda: len(faulty.downs) >= 2)
    task.cancel()
    await asyncio.wait({task})
    assert "KeyError('a fault of our own')" in faulty.downs[0]
    assert any(record.exc_info and record.exc_info[0] is KeyError for record in caplog.records)
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("expired", "its certificate is refused: certificate has expired"),
        ("name", "its certificate is refused: .*mismatch, certificate is not valid for '127.0.0.1'"),
        ("issuer", "its certificate is refused: .*issuer.*cafile"),
        ("plain", "does not speak TLS"),
        ("amqp", "it speaks TLS; write amqps://"),
    ],
)
async def test_each_tls_trouble_is_named(trouble: str, words: str, broker: RabbitMQ, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    expiry = datetime(2020, 1, 1, tzinfo=UTC) if trouble == "expired" else None
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    name = "other.test" if trouble == "name" else "127.0.0.1"
    issuer = trustme.CA() if trouble == "issuer" else authority
    issuer.issue_cert(name, not_after=expiry).configure_cert(server)
    async with asyncio.timeout(20), Peer(tls=server) as peer:
        port = {"plain": broker.port, "amqp": broker.tls_port}.get(trouble, peer.port)
        scheme = "amqp" if trouble == "amqp" else "amqps"
        with pytest.raises(NoLink, match=words):
            await open_link(f"{scheme}://guest:guest@127.0.0.1:{port}/?cafile={tmp_path}/ca.pem", "test", Heard())


async def test_a_login_that_the_broker_lacks_is_named(broker: RabbitMQ) -> None:
    with pytest.raises(StartupError, match=r"offers only these logins: .*PLAIN.*; correct .auth="):
        await open_link(f"{broker.url}?auth=external", "test", Heard())


async def test_cancelling_closes_the_connection_in_order(broker: RabbitMQ, queue_name: str) -> None:
    """What was sent last, perhaps an ack, arrives."""
    async with asyncio.timeout(30), kept(broker.url, queue_name) as one:
        await one.connected.wait()
        assert one._link is not None
        for _ in range(10):  # until it waits for nothing but the loss
            await asyncio.sleep(0)
        await begin_publishing(one._link, asyncio.Event())
        encoder = PublishEncoder(queue_name, one._link.frame_max)
        one._link.lane.send(encoder.encode(b"last", b"m" * 32, packed_seconds(0)))
    async with asyncio.timeout(20), aiormq.connect(broker.url) as other:
        channel = await other.channel()
        while (await channel.queue_declare(queue_name, passive=True)).message_count != 1:
            await asyncio.sleep(0.02)  # until what was delivered to us is back
