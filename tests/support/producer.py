"""A producer without sockets and broker: real API, publishers and connections, over fakes that keep what they get."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from common.amqp.codec import Confirm, Part
from common.config import ProducerSettings
from common.http.connection import Connection, ServerState
from common.http.parser import Limits
from common.http.phases import ServerLimits
from common.http.tokens import parse_tokens
from common.http.turns import Turns
from common.producer.api import Api
from common.producer.metrics import Counters
from common.producer.publisher import Publisher
from common.producer.service import publisher_limits_of
from tests.support.transport import FakeTransport


def an_event(device_id: str = "d", preds: int = 1) -> dict[str, Any]:
    """An event in normal form."""
    pred = {"image_frame": "f", "prob": 0.5, "tags": ["a"]}
    data = {"license_id": "l", "preds": [pred] * preds}
    return {"device_id": device_id, "client_id": "c", "created_at": "t", "data": data}


def post(path: str, body: object, *, packed: bool = False, **fields: str) -> bytes:
    """A POST; the names of `fields` have underscores for dashes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    if packed:
        content, fields = gzip.compress(content), {"Content_Encoding": "gzip", **fields}
    fields = {"Host": "h", "Content_Length": str(len(content)), **fields}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + content


class Answer(NamedTuple):
    """One answer of the server."""

    status: int
    fields: dict[str, str]
    content: Any


class _Lane:
    """A connection to the broker that keeps what was sent."""

    def __init__(self) -> None:
        self.congested = False
        self.sent: list[bytes] = []

    def send(self, parts: Iterable[Part]) -> None:
        self.sent.append(b"".join(parts))

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


class FakeProducer:
    """`lanes[k]` is partition k's connection. Time is `now`, in seconds. Each event has its own message by default."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ProducerSettings(**{"events_per_message": 1, **settings})
        self.now = 1000.0
        self._soon: list[Callable[[], None]] = []
        count = self.settings.partitions
        self.counters = Counters(count, parse_tokens(self.settings.api_token))
        self.publishers = [
            Publisher(
                f"q.{k}",
                publisher_limits_of(self.settings),
                lambda: self.now,
                lambda: self.now,
                self._soon.append,
                self.counters,
                k if count > 1 else None,
            )
            for k in range(count)
        ]
        self.lanes = [_Lane() for _ in self.publishers]
        for publisher, lane in zip(self.publishers, self.lanes, strict=True):
            publisher.link_up(lane, 131_072)
        turns = Turns(self._soon.append, lambda: self.now)
        self.api = Api(self.settings, self.publishers, self.counters, turns, [self.counters.metrics.values])
        limits = ServerLimits(
            request=Limits(),
            connections=100,
            pipelined=32,
            buffered_bytes=1 << 28,
            head_seconds=10.0,
            body_seconds=10.0,
            idle_seconds=10.0,
            write_seconds=10.0,
        )
        self._state = ServerState(limits, self.api, lambda: self.now, turns)
        self._connection = Connection(self._state)
        self._transport = FakeTransport()
        self._connection.connection_made(self._transport)

    def send(self, *requests: bytes) -> list[Answer]:
        """Send requests on the one connection, and run the loop until it is idle. Return the answers."""
        self._connection.data_received(b"".join(requests))
        return self.run()

    def run(self) -> list[Answer]:
        """Run the loop until it is idle. Return the answers since the last call."""
        while self._soon:
            self._soon.pop(0)()
        answers, data = [], bytes(self._transport.sent)
        self._transport.sent.clear()
        while data:
            head, _, data = data.partition(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")
            fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            length = int(fields.get("content-length", "0"))
            content, data = data[:length], data[length:]
            is_json = fields.get("content-type") == "application/json"
            answers.append(Answer(int(status_line.split()[1]), fields, json.loads(content) if is_json else content))
        return answers

    def confirm(self, tag: int, ok: bool = True, multiple: bool = False, partition: int = 0) -> list[Answer]:
        """Confirm as the broker does. Return the answers that this brings."""
        self.publishers[partition].confirms([Confirm(tag, multiple, ok)])
        self.publishers[partition].sweep()
        return self.run()

    def refusals(self, reason: str) -> float:
        """Return how many events were refused for this reason."""
        return self.counters.metrics.values[self.counters.refusals[reason]]
