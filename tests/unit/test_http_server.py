"""A server on real sockets: what its stop, and its replacement, mean for the clients that come at that moment."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator

import pytest
import trustme

from common.http.connection import ServerLimits
from common.http.exchange import Exchange
from common.http.parser import Head, Limits, Request
from common.http.server import HttpServer
from common.workers import reserve_port

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


class Hello:
    """An application that answers every request."""

    def check(self, head: Head) -> bytes:
        return b""

    def handle(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, b"hello")

    def answered(self, exchange: Exchange, status: int) -> None:
        pass


async def get(client: socket.socket) -> bytes:
    """Send a request and read to the end of the connection."""
    loop, answer = asyncio.get_running_loop(), b""
    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    while piece := await loop.sock_recv(client, 1000):
        answer += piece
    return answer


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setblocking(False)
        yield client


async def test_a_stop_refuses_who_comes_and_resets_nobody(client: socket.socket) -> None:
    """A client that was connected when its listener closed could be reset with its request on the way."""
    server = HttpServer(LIMITS, Hello())
    port = await server.listen("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port)) as early:  # in the queue, not accepted yet
        early.setblocking(False)
        stop = asyncio.create_task(server.stop_listening())
        await asyncio.sleep(0)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        assert (await get(early)).startswith(b"HTTP/1.1 200")
    await stop
    await server.drained()
    server.abort()


@pytest.fixture
def tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("h").configure_cert(context)
    return context


async def test_a_stop_answers_a_client_in_its_tls_handshake(tls: ssl.SSLContext) -> None:
    """Its connection was not counted yet, so the process ended and cut it off."""
    server = HttpServer(LIMITS, Hello())
    port = await server.listen("127.0.0.1", 0, tls)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = context.wrap_bio(incoming, outgoing)
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
        incoming.write(await reader.read(10_000))
        assert client.read(1000).startswith(b"HTTP/1.1 200")
        writer.close()
        await drained
    server.abort()


async def test_clients_that_never_begin_tls_delay_a_stop_by_a_second_in_all(tls: ssl.SSLContext) -> None:
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


async def test_clients_that_come_in_a_replacement_go_to_the_new_one() -> None:
    """Then the old one can stop without any that it would have to turn away; afterwards all of them share again."""
    port = reserve_port("127.0.0.1", 0)
    old, staying, new = servers = [HttpServer(LIMITS, Hello()) for _ in range(3)]
    loop, clients = asyncio.get_running_loop(), list[socket.socket]()

    async def connect(count: int) -> None:
        for _ in range(count):
            clients.append(socket.socket())
            clients[-1].setblocking(False)
            await loop.sock_connect(clients[-1], port.getsockname())
        async with asyncio.timeout(10):
            while sum(len(server.connections) for server in servers) < len(clients):
                await asyncio.sleep(0.001)

    try:
        for server in (old, staying):
            await server.listen("127.0.0.1", port.getsockname()[1], processes=2)
        await connect(40)
        before = len(old.connections), len(staying.connections)
        assert min(before) > 0
        await new.listen("127.0.0.1", port.getsockname()[1], processes=2)
        await connect(20)
        assert [len(server.connections) for server in servers] == [*before, 20]
        await old.stop_listening()
        await connect(40)
        assert len(staying.connections) > before[1]
        assert len(new.connections) > 20
    finally:
        for server in servers:
            server.abort()
        for each in (port, *clients):
            each.close()
