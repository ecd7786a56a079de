"""A server on real sockets, with TLS and without: its limits, its time-outs, and its stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from common.http.exchange import Application, Exchange
from common.http.parser import Head, Limits, Request
from common.http.phases import IDLE, ServerLimits
from common.http.pool import SILENT_SECONDS
from common.http.server import HttpServer
from common.http.tls import Tls
from tests.support.tls13 import HANDSHAKE, KEY_UPDATE, HandmadeClient, Keys

LIMITS = ServerLimits(
    request=Limits(),
    connections=100,
    pipelined=4,
    buffered_bytes=1_000_000,
    head_seconds=10.0,
    body_seconds=10.0,
    idle_seconds=5.0,
    write_seconds=20.0,
)
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000)


class Hello:
    """An application that answers every request."""

    def check(self, head: Head) -> bytes:
        return b""

    def handle(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, b"hello")

    def answered(self, exchange: Exchange, status: int) -> None:
        pass


class Large(Hello):
    """An application with large answers, which it counts."""

    handled = 0

    def handle(self, request: Request, exchange: Exchange) -> None:
        self.handled += 1
        exchange.answer(200, b"x" * 100_000)


class Later(Hello):
    """An application that answers when the test does."""

    def __init__(self) -> None:
        self.waiting: list[Exchange] = []

    def handle(self, request: Request, exchange: Exchange) -> None:
        self.waiting.append(exchange)


@contextlib.asynccontextmanager
async def serving(
    application: Application | None = None, tls: ssl.SSLContext | None = None, **limits: Any
) -> AsyncIterator[tuple[HttpServer, int]]:
    """A server and its port."""
    server = HttpServer(replace(LIMITS, **limits), application or Hello())
    try:
        yield server, await server.listen("127.0.0.1", 0, tls)
    finally:
        server.abort()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.002)


async def connect(port: int) -> socket.socket:
    client = socket.socket()
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return client


async def exchange(port: int, sent: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """Send all, then read to the end of the connection, in another thread as a client would."""

    def run() -> bytes:
        with socket.create_connection(("127.0.0.1", port), 10) as plain:
            client = plain if tls is None else tls.wrap_socket(plain)
            client.sendall(sent)
            with client:
                return b"".join(iter(lambda: client.recv(65536), b""))

    return await asyncio.to_thread(run)


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on the loop that the processes use."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        uvloop.run(test(**fixtures))

    return run


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("h").configure_cert(context)
    return context


@pytest.fixture
def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize(
    ("sent", "answer"),
    [(b"GET / HTTP/1.1\r\nHo", b"HTTP/1.1 408 "), (POST[:-1], b"HTTP/1.1 408 "), (b"", b""), (GET, b"HTTP/1.1 200 ")],
    ids=["head", "body", "never a byte", "idle after an answer"],
)
@on_uvloop
async def test_a_client_that_stalls_is_closed_in_time(sent: bytes, answer: bytes) -> None:
    async with serving(head_seconds=0.2, body_seconds=0.2, idle_seconds=0.5) as (_, port):
        got = await exchange(port, sent)
    assert got.startswith(answer)
    assert got.count(b"HTTP/1.1") == (1 if answer else 0)


@on_uvloop
async def test_a_head_that_drips_is_not_granted_more_time() -> None:
    async with serving(head_seconds=0.3) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n")
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(10):
            while not answer.done():
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.02)
        assert answer.result().startswith(b"HTTP/1.1 408 ")
        writer.close()


@on_uvloop
async def test_a_client_that_reads_nothing_is_bounded_and_cut_off() -> None:
    """Its requests are handled only up to one depth of the pipeline. Then it has its time to read."""
    application = Large()
    async with serving(application, write_seconds=0.3) as (server, port):
        client = await connect(port)
        await asyncio.get_running_loop().sock_sendall(client, GET * 1500)
        await until(lambda: server.state.pool.held_bytes > 0)
        assert server.state.pool.held_bytes <= (LIMITS.pipelined + 2) * 100_000
        await until(lambda: not server.connections)
        assert application.handled < 100
        assert server.state.pool.held_bytes == 0
        client.close()


@pytest.mark.parametrize("has_tls", [False, True])
@on_uvloop
async def test_refusals_reach_clients_that_send_first(
    has_tls: bool, tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    """What follows the last request is dropped, without a reset."""
    request = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9000000\r\n\r\n" + bytes(9_000_000)
    async with serving(tls=tls if has_tls else None) as (server, port):
        for sent, status in ((request, b"413"), (GET[:-2] + b"Connection: close\r\n\r\n" + request, b"200")):
            answer = await exchange(port, sent, trusting if has_tls else None)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert b"Connection: close" in answer
        await until(lambda: not server.connections)


@on_uvloop
async def test_tls_carries_requests_and_answers_of_any_size(tls: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    async with serving(Large(), tls) as (server, port):
        answer = await exchange(port, POST * 9 + GET[:-2] + b"Connection: close\r\n\r\n", trusting)
        assert answer.count(b"HTTP/1.1 200 ") == 10
        assert len(answer) > 1_000_000
        assert not await exchange(port, GET)  # without TLS
        await until(lambda: not server.connections)
        assert server.state.pool.held_bytes == 0


@on_uvloop
async def test_half_a_tls_message_harms_only_its_sender(tls: ssl.SSLContext, tmp_path: Path) -> None:
    """OpenSSL encrypts nothing before the rest has come, and an answer is due. Who gives it must get no error."""
    application = Later()
    async with serving(application, tls) as (server, port):
        client = await asyncio.to_thread(HandmadeClient, port, tmp_path)
        client.socket.sendall(client.record(GET) + client.record(KEY_UPDATE[:-1], HANDSHAKE))
        await until(lambda: len(application.waiting) == 1)
        application.waiting[0].answer(200, b"hello")
        await until(lambda: not server.connections)
        client.socket.close()


def test_what_comes_with_the_end_of_a_handshake_is_bounded_too(tls: ssl.SSLContext, tmp_path: Path) -> None:
    """Else OpenSSL reads all of it at once, within one step."""
    server, incoming = Tls(tls), ssl.MemoryBIO()
    client, outgoing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.MemoryBIO()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.keylog_filename = str(tmp_path / "keys")
    hands = client.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        hands.do_handshake()
    server.receive(outgoing.read())
    assert not server.shake_hands()
    incoming.write(server.outgoing())
    hands.do_handshake()
    keys = Keys(tmp_path / "keys")
    server.receive(outgoing.read() + b"".join(keys.key_update() for _ in range(2000)))
    assert server.shake_hands()
    with pytest.raises(ssl.SSLError, match="framing"):
        server.decrypt(b"")


@pytest.mark.parametrize("kind", ["changes of keys", "one-byte records"])
def test_a_client_that_sends_little_but_framing_is_cut_off(tls: ssl.SSLContext, tmp_path: Path, kind: str) -> None:
    """Each record takes as long as many bytes."""

    @on_uvloop
    async def test() -> None:
        async with serving(tls=tls, idle_seconds=1000.0, body_seconds=1000.0) as (server, port):
            client = await asyncio.to_thread(HandmadeClient, port, tmp_path)
            flood = [client.record(POST[:-100_000])]
            flood += [client.key_update() if kind == "changes of keys" else client.record(b"x") for _ in range(3000)]
            client.socket.sendall(b"".join(flood))
            await until(lambda: not server.connections)
            client.socket.close()

    test()


@on_uvloop
async def test_a_client_may_write_each_line_and_its_end_alone(tls: ssl.SSLContext, tmp_path: Path) -> None:
    """A microcontroller's println does so, in as many requests as it likes."""
    async with serving(tls=tls) as (server, port):
        client = await asyncio.to_thread(HandmadeClient, port, tmp_path)
        lines = (GET[:-2] + b"Accept: text/plain\r\n" * 25 + b"\r\n").splitlines()
        for _ in range(500):
            client.socket.sendall(b"".join(client.record(line) + client.record(b"\r\n") for line in lines))
        [connection] = server.connections
        await until(lambda: connection.phase is IDLE)
        client.socket.close()


@on_uvloop
async def test_a_client_may_change_its_keys(tls: ssl.SSLContext, tmp_path: Path) -> None:
    async with serving(tls=tls) as (server, port):
        client = await asyncio.to_thread(HandmadeClient, port, tmp_path)
        for _ in range(3):
            client.socket.sendall(client.key_update() + client.record(POST[:100]) + client.key_update())
            client.socket.sendall(
                b"".join(client.record(POST[at : at + 16_000]) for at in range(100, len(POST), 16_000))
            )
        [connection] = server.connections
        await until(lambda: connection.phase is IDLE)
        client.socket.close()


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET / HT"])
def test_a_client_that_ends_tls_without_a_request_is_closed(
    tls: ssl.SSLContext, trusting: ssl.SSLContext, sent: bytes
) -> None:
    """It is closed at once, not after the idle time, although its side of the TCP connection stays open."""

    def run(port: int) -> None:
        with trusting.wrap_socket(socket.create_connection(("127.0.0.1", port), 10)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # what is sent and the end come in one segment
            if sent:
                client.sendall(sent)
            assert client.unwrap().recv(1) == b""

    @on_uvloop
    async def test() -> None:
        async with serving(tls=tls, idle_seconds=1000.0) as (_, port):
            await asyncio.to_thread(run, port)

    test()


@on_uvloop
async def test_silent_handshakes_take_no_place_for_long(tls: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """They count from the accept on, and the longest silent one makes room for a newcomer."""
    async with serving(tls=tls) as (server, port):
        crowd = [await connect(port) for _ in range(LIMITS.connections)]
        await until(lambda: len(server.connections) == LIMITS.connections)
        await asyncio.sleep(SILENT_SECONDS)
        assert (await exchange(port, LAST_GET, trusting)).startswith(b"HTTP/1.1 200 ")
        assert await asyncio.get_running_loop().sock_recv(crowd[0], 1) == b""
        for client in crowd:
            client.close()


@on_uvloop
async def test_handshakes_hold_a_bounded_memory(tls: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """Each is as large as a ClientHello can be, and never whole."""
    hello = b"\x16\x03\x01\x3f\xff\x01\x00\x3f\xf0\x03\x03" + bytes(15_000)
    async with serving(tls=tls, connections=1000) as (server, port):
        crowd = [await connect(port) for _ in range(60)]
        for client in crowd:
            await asyncio.get_running_loop().sock_sendall(client, hello)
        await until(lambda: 0 < len(server.connections) < 60)
        assert 0 < server.state.pool.held_bytes <= LIMITS.buffered_bytes
        await asyncio.sleep(SILENT_SECONDS)
        assert (await exchange(port, LAST_GET, trusting)).startswith(b"HTTP/1.1 200 ")
        for client in crowd:
            client.close()


@on_uvloop
async def test_a_lack_of_descriptors_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """An idle client is closed, so that the next one finds a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(idle_seconds=60.0) as (server, port):
        idle = await connect(port)
        await until(lambda: len(server.connections) == 1)
        await asyncio.sleep(SILENT_SECONDS)
        os.close(free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            await until(lambda: not server.connections)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        idle.close()
    assert [record.getMessage() for record in caplog.records] == ["clients are refused: Too many open files"]


@on_uvloop
async def test_clients_without_a_place_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(connections=1) as (_, port):
        first = await connect(port)
        for _ in range(3):
            assert (await exchange(port, b"")).startswith(b"HTTP/1.1 503 ")
        await until(lambda: bool(caplog.records))
        first.close()
    assert [record.getMessage() for record in caplog.records] == ["clients are refused: all 1 connections are in use"]


@on_uvloop
async def test_a_stop_refuses_new_clients_and_answers_the_others() -> None:
    async with serving() as (server, port):
        early = await connect(port)
        await until(lambda: len(server.connections) == 1)  # on a busy machine, it waits in the kernel's queue
        await server.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            await exchange(port, b"")
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(early, GET)
        assert b"Connection: close" in await loop.sock_recv(early, 1000)
        await server.drained()
        early.close()


@on_uvloop
async def test_a_stop_leaves_the_queue_of_a_held_socket() -> None:
    """The next process answers the clients in it."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        first, second = servers = [HttpServer(LIMITS, Hello()) for _ in range(2)]
        for server in servers:
            await server.listen("", 0, inherited=socket.socket(fileno=os.dup(held.fileno())))
            if server is first:
                await first.stop_listening()
                client = await connect(held.getsockname()[1])
        await asyncio.get_running_loop().sock_sendall(client, GET)
        assert (await asyncio.get_running_loop().sock_recv(client, 1000)).startswith(b"HTTP/1.1 200 ")
        client.close()
        second.abort()


@on_uvloop
async def test_a_stop_answers_a_client_in_its_tls_handshake(tls: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """Its connection was not counted yet, so the process ended and cut it off."""
    server = HttpServer(LIMITS, Hello())
    port = await server.listen("127.0.0.1", 0, tls)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(incoming, outgoing)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    writer.write(outgoing.read())
    incoming.write(await reader.read(10_000))
    await server.stop_listening()
    drained = asyncio.create_task(server.drained())
    await asyncio.sleep(0.02)
    assert not drained.done()  # it would end the process
    client.do_handshake()
    client.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    writer.write(outgoing.read())
    async with asyncio.timeout(5):
        answer = b""
        while not answer:
            incoming.write(await reader.read(10_000))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = client.read(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        writer.close()
        await drained
    server.abort()


@on_uvloop
async def test_clients_that_never_begin_tls_delay_a_stop_by_a_second(tls: ssl.SSLContext) -> None:
    """It waited 10 s for each that was in the queue, one after the other."""
    server = HttpServer(LIMITS, Hello())
    listener = socket.create_server(("127.0.0.1", 0))
    await server.listen("127.0.0.1", 0, tls, inherited=listener)
    silent = [socket.create_connection(listener.getsockname()) for _ in range(3)]
    async with asyncio.timeout(5):
        await server.stop_listening()
        await server.drained()
    server.abort()
    for each in silent:
        each.close()
