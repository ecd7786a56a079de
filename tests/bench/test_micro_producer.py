"""What the producer does for one small event, step by step. `pytest tests/bench` times it; `make test` only runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import cast

from pytest_benchmark.fixture import BenchmarkFixture

from common.amqp.codec import Confirm, Part, PublishEncoder, packed_seconds
from common.errors import NotConfirmed
from common.event.document import read_json
from common.event.schema import normalise_event
from common.http.exchange import Client, Exchange
from common.http.fields import JSON
from common.http.parser import Limits, RequestParser
from common.producer.metrics import Counters
from common.producer.publisher import Publication, Publisher, PublisherLimits
from tests.bench import events

FRAME_MAX = 131_072
WINDOW = 1000  # unconfirmed events

SMALL = events.small(count=100)
BODY = SMALL.bodies[1]
MESSAGE_ID, STAMP = b"0123456789abcdef" * 2, packed_seconds(1_700_000_000)


def test_parse_a_request(benchmark: BenchmarkFixture) -> None:
    parser = RequestParser(Limits())
    data = events.post_request(BODY)

    def parse() -> bytes:
        parser.receive_data(data)
        request = parser.next_request()
        assert request is not None
        return request.body

    assert benchmark(parse) == BODY


def test_parse_a_request_that_comes_in_pieces(benchmark: BenchmarkFixture) -> None:
    parser = RequestParser(Limits())
    data = events.post_request(BODY)
    pieces = [data[:20], data[20:150], data[150:]]

    def parse() -> bytes:
        for piece in pieces:
            parser.receive_data(piece)
            request = parser.next_request()
        assert request is not None
        return request.body

    assert benchmark(parse) == BODY


def test_validate_and_normalise_an_event(benchmark: BenchmarkFixture) -> None:
    assert read_json(benchmark(normalise_event, BODY, 10_000).body) == read_json(BODY)


def test_validate_and_normalise_an_event_with_images(benchmark: BenchmarkFixture) -> None:
    body = events.with_frames(count=1).bodies[0]
    assert read_json(benchmark(normalise_event, body, 10_000).body) == read_json(body)


def test_encode_an_answer(benchmark: BenchmarkFixture) -> None:
    exchange = Exchange(cast(Client, None), None, 0.0)
    exchange.response = 200, BODY, JSON, b""
    assert benchmark(exchange.encode, b"Sun, 29 Nov 2026 10:00:00 GMT")[0].endswith(b"\r\n\r\n" + BODY)


def test_encode_a_publish(benchmark: BenchmarkFixture) -> None:
    encoder = PublishEncoder("predictions", FRAME_MAX)
    assert BODY in benchmark(encoder.encode, BODY, MESSAGE_ID, STAMP)


class _Lane:
    """A lane that sends its frames nowhere."""

    congested = False

    def send(self, parts: Iterable[Part]) -> None:
        pass

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


class _Event(Publication):
    def __init__(self) -> None:
        self.body = BODY
        self.message_id = MESSAGE_ID
        self.rows = 1
        self.heard = 0

    def confirmed(self) -> None:
        self.heard += 1

    def failed(self, error: NotConfirmed) -> None:
        raise AssertionError(error)


def _connected_publisher() -> tuple[Publisher, Callable[[], None]]:
    """A publisher, and what ends its turn of the event loop."""
    soon: list[Callable[[], None]] = []
    limits = PublisherLimits(WINDOW, 2**30, 10.0, 64)
    publisher = Publisher("predictions", limits, lambda: 1.0, lambda: 1.0, soon.append, Counters())
    publisher.link_up(_Lane(), FRAME_MAX)
    return publisher, lambda: soon.pop()()


def test_publish_and_match_one_confirm(benchmark: BenchmarkFixture) -> None:
    (publisher, end_turn), event, tags = _connected_publisher(), _Event(), count(1)

    def publish() -> None:
        publisher.publish(event)
        end_turn()
        publisher.confirms([Confirm(next(tags), False, True)])

    benchmark(publish)
    assert event.heard
    assert publisher.unconfirmed == 0


def test_match_the_confirms_of_a_full_window(benchmark: BenchmarkFixture) -> None:
    """1,000 events: half confirmed one by one from the top, the rest by one confirm with `multiple`."""
    window = [_Event() for _ in range(WINDOW)]
    confirms = [Confirm(tag, False, True) for tag in range(WINDOW, WINDOW // 2, -1)] + [Confirm(WINDOW, True, True)]

    def filled() -> tuple[tuple[Publisher], dict[str, object]]:
        publisher, end_turn = _connected_publisher()
        for event in window:
            publisher.publish(event)
            end_turn()
        return (publisher,), {}

    benchmark.pedantic(lambda publisher: publisher.confirms(confirms), setup=filled, rounds=50)  # type: ignore[no-untyped-call]
    assert len({event.heard for event in window}) == 1
