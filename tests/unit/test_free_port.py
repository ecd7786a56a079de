"""A free port is given out once: no other process takes it between the choice and the server's start."""

from __future__ import annotations

import socket
import sys

import pytest

from scripts.rabbitmq import free_port


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lets a socket that only holds a port and a server share it")
def test_a_free_port_is_kept_for_a_server_that_asks_for_it() -> None:
    port = free_port()
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    for _ in range(2):  # a restart too
        with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            pass
