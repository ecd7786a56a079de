"""A TCP proxy in front of a broker, in a test's own loop. It cuts connections, goes silent, holds or drops."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self


class Proxy:
    """A proxy to the broker on loopback. Each new connection takes the next of `cuts`; without one, it is not cut."""

    def __init__(self, broker_port: int, reset: bool = False) -> None:
        """`reset`: a cut is an RST, not a FIN."""
        self.port = 0
        self.cuts: list[int] = []  # bytes from the broker that pass before the cut; the last one is taken first
        self.passed_bytes = 0  # from the broker, on the newest connection
        self.silent = False  # nothing passes any more, and connections stay open
        self.cut = asyncio.Event()  # a connection was cut
        self.answers_pass = asyncio.Event()  # while it is clear, what the broker sends is held
        self.answers_pass.set()
        self.drops = False  # what is sent to the broker is thrown away
        self.dropped_bytes = 0
        self.forwarded_bytes = 0  # to the broker
        self._broker_port = broker_port
        self._reset = reset
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def listen(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut every connection, and refuse new ones."""
        if self._server is not None:
            self._server.close()
        for _ in range(3):  # a client that was accepted before that is a task by then
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(from_client, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: to_client.close())  # it can be cancelled before its first step

    async def _forward(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        cut = self.cuts.pop() if self.cuts else None
        self.passed_bytes = passed = 0
        from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._broker_port)
        upwards = asyncio.create_task(self._upwards(from_client, to_broker))
        try:
            while data := await from_broker.read(65536):
                if self.silent:
                    continue
                await self.answers_pass.wait()
                if cut is not None and passed + len(data) >= cut:
                    to_client.write(data[: cut - passed])
                    await to_client.drain()
                    self.cut.set()
                    break
                passed += len(data)
                self.passed_bytes = passed
                to_client.write(data)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            upwards.cancel()
            if self._reset:
                linger = struct.pack("ii", 1, 0)
                to_client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                to_client.transport.abort()
            to_client.close()
            to_broker.transport.abort()
            with contextlib.suppress(asyncio.CancelledError):  # transports close in a later turn of the loop
                await asyncio.gather(upwards, to_client.wait_closed(), to_broker.wait_closed(), return_exceptions=True)

    async def _upwards(self, from_client: asyncio.StreamReader, to_broker: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await from_client.read(65536):
                if self.drops:
                    self.dropped_bytes += len(data)
                elif not self.silent:
                    to_broker.write(data)
                    self.forwarded_bytes += len(data)
            to_broker.close()
