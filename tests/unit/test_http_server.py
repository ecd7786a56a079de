"""Connections that wait for a client to read, seen through a transport that keeps what it is told."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from common.http.parser import Head, Limits, Request
from common.http.server import Connection, Exchange, HttpServer, ServerLimits

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


class Transport:
    """The client reads nothing while `unsent` is set."""

    def __init__(self) -> None:
        self.unsent = 0
        self.closing = self.aborted = False

    def write(self, data: bytes) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True


class Hello:
    """An application that answers at once."""

    def check(self, head: Head) -> None:
        pass

    def handle(self, request: Request, exchange: Exchange) -> None:
        exchange.answer(200, b"hello")

    def answered(self, exchange: Exchange, status: int) -> None:
        pass


@pytest.fixture
def opened() -> tuple[HttpServer, Connection, Transport]:
    limits = ServerLimits(Limits(), 10, 8, 1_000_000, 10.0, 10.0, idle_seconds=5.0, write_seconds=20.0)
    server, transport = HttpServer(limits, Hello()), Transport()
    connection = Connection(server)
    connection.connection_made(cast(asyncio.Transport, transport))
    return server, connection, transport


def test_an_idle_client_is_closed_and_one_that_left_its_answer_unread_is_cut_off(
    opened: tuple[HttpServer, Connection, Transport],
) -> None:
    server, connection, transport = opened
    connection.data_received(GET)
    connection.sweep(server.now() + 4)
    assert not transport.closing
    transport.unsent = 100  # below the mark at which the transport would complain
    connection.sweep(server.now() + 6)
    assert transport.aborted


def test_a_close_that_waits_for_the_client_to_read_does_not_wait_for_ever(
    opened: tuple[HttpServer, Connection, Transport],
) -> None:
    server, connection, transport = opened
    transport.unsent = 100
    connection.data_received(LAST_GET)
    assert transport.closing
    connection.sweep(server.now() + 19)
    assert not transport.aborted
    connection.sweep(server.now() + 21)
    assert transport.aborted


def test_answers_that_nobody_reads_are_bounded_over_all_connections(
    opened: tuple[HttpServer, Connection, Transport],
) -> None:
    server, connection, transport = opened
    connection.pause_writing()
    transport.unsent = 999_999
    connection.data_received(GET)
    assert not transport.aborted
    transport.unsent = 1_000_001
    connection.data_received(LAST_GET)
    assert transport.aborted
    connection.connection_lost(None)
    assert server.buffered_bytes == 0
