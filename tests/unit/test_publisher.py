"""The unconfirmed window."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.amqp.codec import Confirm, Part
from common.errors import NotConfirmed, OutcomeUnknown, TooLarge, Unavailable
from common.producer.publisher import Publication, Publisher


class Lane:
    """A connection that keeps what was sent."""

    def __init__(self) -> None:
        self.congested = False
        self.sent: list[bytes] = []
        self.failed = ""

    def send(self, parts: Iterable[Part]) -> None:
        self.sent.append(b"".join(parts))

    def fail(self, reason: str) -> None:
        self.failed = reason


class Event(Publication):
    def __init__(self, body: bytes, message_id: bytes) -> None:
        self.body = body
        self.message_id = message_id
        self.outcomes: list[str | int] = []

    def confirmed(self, seconds: float) -> None:
        self.outcomes.append("confirmed")

    def failed(self, error: NotConfirmed) -> None:
        self.outcomes.append(
            503 if isinstance(error, Unavailable) else 504 if isinstance(error, OutcomeUnknown) else 413
        )


class Bench:
    """A publisher with a lane and a clock that a test moves."""

    def __init__(self, max_unconfirmed: int = 100, max_bytes: int = 10_000) -> None:
        self.time = 1000.0
        self.publisher = Publisher("q", max_unconfirmed, max_bytes, 10.0, lambda: self.time, lambda: self.time)
        self.lane = Lane()
        self.publisher.link_up(self.lane, 131072)

    def wait(self, seconds: float) -> None:
        """Let time pass, and the sweeps of that time: one that comes late counts nothing against the broker."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + 0.1)
            self.publisher.sweep()

    def publish(self, number: int = 0, size: int = 10) -> Event:
        event = Event(b"x" * size, b"%032d" % number)
        self.publisher.publish(event)
        return event


def test_an_event_is_confirmed_only_by_its_own_confirm() -> None:
    bench = Bench()
    first, second = bench.publish(1), bench.publish(2)
    bench.publisher.confirms([Confirm(2, False, True)])
    assert (first.outcomes, second.outcomes) == ([], ["confirmed"])
    assert bench.publisher.unconfirmed == 1


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.booleans()), max_size=40), st.integers(1, 30))
def test_every_event_hears_exactly_one_outcome(confirms: list[tuple[int, bool, bool]], count: int) -> None:
    """Every event hears exactly one outcome whatever the order of confirms."""
    bench = Bench()
    events = [bench.publish(number) for number in range(1, count + 1)]
    expected: dict[int, str | int] = {}
    for tag, multiple, ok in confirms:
        bench.publisher.confirms([Confirm(tag, multiple, ok)])
        for covered in range(1 if multiple else tag, tag + 1):
            expected.setdefault(covered, "confirmed" if ok else 503)
    assert [event.outcomes for event in events] == [
        [expected[tag]] if tag in expected else [] for tag in range(1, count + 1)
    ]
    bench.wait(11)
    assert all(len(event.outcomes) == 1 for event in events)
    assert bench.publisher.unconfirmed == bench.publisher.unconfirmed_bytes == 0


def test_a_nack_is_never_a_200() -> None:
    bench = Bench()
    event = bench.publish()
    bench.publisher.confirms([Confirm(1, False, False)])
    assert event.outcomes == [503]


def test_no_confirm_in_time_is_unknown_and_stays_so() -> None:
    """No confirm in time is 504 and a late confirm changes nothing."""
    bench = Bench()
    event = bench.publish()
    bench.wait(9.9)
    assert event.outcomes == []
    bench.wait(0.2)
    bench.publisher.confirms([Confirm(1, False, True)])
    assert event.outcomes == [504]


def test_a_link_without_one_confirm_is_given_up() -> None:
    """A link without one confirm in the whole time is given up."""
    bench = Bench()
    bench.publish()
    bench.time += 5
    bench.publish()
    bench.publisher.confirms([Confirm(2, False, True)])
    bench.wait(5.1)
    assert bench.lane.failed == ""
    bench.publish()
    bench.wait(10.1)
    assert "no confirm" in bench.lane.failed


def test_a_blocked_broker_is_waited_for_not_given_up() -> None:
    bench = Bench()
    event = bench.publish()
    bench.publisher.blocked("low on memory")
    bench.wait(10.1)
    assert (event.outcomes, bench.lane.failed) == ([504], "")


def test_events_in_flight_at_a_loss_are_published_again_first() -> None:
    """Events in flight when the link goes down are published again first with the same message id."""
    bench = Bench()
    events = [bench.publish(number) for number in (1, 2, 3)]
    bench.publisher.confirms([Confirm(2, False, True)])
    bench.publisher.down("cut")
    bench.publisher.confirms([Confirm(1, False, True)])  # of the old channel: means nothing any more
    assert events[0].outcomes == []
    second = Lane()
    bench.publisher.link_up(second, 131072)
    assert [b"%032d" % number in sent for number, sent in zip((1, 3), second.sent, strict=True)] == [True, True]
    new = bench.publish(4)
    bench.publisher.confirms([Confirm(2, True, True)])
    assert [event.outcomes for event in (*events, new)] == [["confirmed"]] * 3 + [[]]
    bench.publisher.confirms([Confirm(3, False, True)])
    assert new.outcomes == ["confirmed"]


def test_held_events_keep_their_deadline() -> None:
    bench = Bench()
    event = bench.publish()
    bench.publisher.down("cut")
    bench.wait(10.1)
    assert event.outcomes == [504]
    second = Lane()
    bench.publisher.link_up(second, 131072)
    assert second.sent == []


@pytest.mark.parametrize("trouble", ["away", "blocked", "count", "bytes", "congested"])
def test_what_cannot_be_sent_is_refused_with_its_reason(trouble: str) -> None:
    """What cannot be sent is refused at once and the refusal says why."""
    bench = Bench(max_unconfirmed=2, max_bytes=100)
    publisher = bench.publisher
    assert publisher.trouble() is None
    if trouble == "away":
        publisher.down("cut")
    elif trouble == "blocked":
        publisher.blocked("low on memory")
    elif trouble == "count":
        bench.publish(), bench.publish()
    elif trouble == "bytes":
        bench.publish(size=100)
    else:
        bench.lane.congested = True
    sent = len(bench.lane.sent)
    with pytest.raises(Unavailable) as refusal:
        bench.publish()
    assert len(bench.lane.sent) == sent
    if trouble in ("count", "bytes", "congested"):
        assert refusal.value.reason == "window_full"
        assert publisher.trouble() is None, "a full window that moves is no trouble"
    else:
        assert str(publisher.trouble()) == str(refusal.value)
    if trouble == "blocked":
        assert "low on memory" in str(refusal.value)


def test_a_drain_that_takes_too_long_answers_everything() -> None:
    bench = Bench()
    sent = bench.publish(1)
    bench.publisher.down("cut")
    bench.publisher.link_up(bench.lane, 131072)
    held = bench.publish(2)
    bench.publisher.fail_all()
    assert (sent.outcomes, held.outcomes) == ([504], [504])
    assert bench.publisher.unconfirmed_bytes == 0


def test_a_nack_of_a_republished_event_is_unknown() -> None:
    """A nack of an event that was published before leaves its outcome unknown."""
    bench = Bench()
    event = bench.publish()
    bench.publisher.down("cut")
    bench.publisher.link_up(bench.lane, 131072)
    bench.publisher.confirms([Confirm(1, False, False)])
    assert event.outcomes == [504]


def test_a_stall_is_told_refused_and_ended_by_one_confirm() -> None:
    bench = Bench()
    bench.publish(), bench.publish()
    bench.wait(6)
    assert bench.publisher.is_stalled
    with pytest.raises(Unavailable, match="confirms no events"):
        bench.publish()
    bench.publisher.confirms([Confirm(1, False, True)])
    assert (bench.publisher.is_stalled, bench.publisher.trouble()) == (False, None)


def test_our_own_lateness_is_not_the_brokers_silence() -> None:
    """The confirms lie in the socket while our loop is held up: the first sweep after it gives up on nothing."""
    bench = Bench()
    event = bench.publish()
    bench.time += 60
    bench.publisher.sweep()
    assert (event.outcomes, bench.lane.failed, bench.publisher.is_stalled) == ([], "", False)
    bench.publisher.confirms([Confirm(1, False, True)])
    bench.wait(0.2)
    assert (event.outcomes, bench.lane.failed) == (["confirmed"], "")


def test_a_loop_that_is_always_late_still_gives_up() -> None:
    bench = Bench()
    event = bench.publish()
    for _ in range(20):
        bench.time += 1
        bench.publisher.sweep()
    assert event.outcomes == [504]


def test_only_nacks_take_new_links_less_and_less_often() -> None:
    """A new link helps against a bug of RabbitMQ 3.10, not against a queue that is full."""
    bench, lived = Bench(), []
    for _ in range(7):
        bench.lane.failed, began, tag = "", bench.time, 0
        while not bench.lane.failed:
            if bench.publisher.trouble() is None:
                tag += 1
                assert bench.publish().outcomes == []
                bench.publisher.confirms([Confirm(tag, False, False)])
            bench.wait(0.1)
        lived.append(round(bench.time - began))
        assert "nack" in bench.lane.failed
        bench.publisher.down(bench.lane.failed)
        bench.publisher.link_up(bench.lane, 131072)
        assert bench.publisher.trouble() is None, "of the new one nothing bad is known"
    assert lived == [2, 4, 8, 16, 30, 30, 30]


def test_a_nack_among_confirms_is_no_stall() -> None:
    bench = Bench()
    for number in range(1, 101):
        bench.publish()
        bench.publisher.confirms([Confirm(number, False, number % 2 == 0)])
        bench.wait(0.1)
    assert (bench.lane.failed, bench.publisher.is_stalled) == ("", False)


@pytest.mark.parametrize("reason", ["closed: ACCESS_REFUSED - access refused", "refused user (ACCESS_REFUSED)"])
def test_what_a_user_may_not_publish_is_answered_at_once(reason: str) -> None:
    """No new link helps, and of several in flight nobody knows which the broker took."""
    bench = Bench()
    events = [bench.publish(number) for number in (1, 2)]
    bench.publisher.down(reason)
    assert [event.outcomes for event in events] == [[504], [504]]
    assert (bench.publisher.unconfirmed, bench.publisher.unconfirmed_bytes) == (0, 0)


def test_a_failure_heard_while_going_down_publishes_nothing() -> None:
    """A batch publishes its next event as soon as it hears of one: not on a link that is gone."""
    bench = Bench()
    refused = []

    class Next(Event):
        def failed(self, error: NotConfirmed) -> None:
            with pytest.raises(Unavailable) as why:
                bench.publish()
            refused.append(why.value.reason)

    bench.publisher.publish(Next(b"x", b"%032d" % 0))
    bench.publisher.down("closed: ACCESS_REFUSED")
    assert refused == ["broker_away"]
    assert bench.publisher.unconfirmed == 0


def test_an_event_above_the_brokers_limit_is_refused() -> None:
    """It fails at once if it was what closed the channel; the others go out again."""
    bench = Bench()
    large, small = bench.publish(1, size=200), bench.publish(2)
    bench.publisher.down("closed: PRECONDITION_FAILED - message size 200 is larger than configured max size 100")
    assert (large.outcomes, small.outcomes) == ([413], [])
    bench.publisher.link_up(bench.lane, 131072)
    with pytest.raises(TooLarge):
        bench.publish(size=101)


def test_a_republished_event_above_the_brokers_limit_is_unknown() -> None:
    """The broker may have taken its first copy: 413 would say that it is not stored."""
    bench = Bench()
    large = bench.publish(1, size=200)
    bench.publisher.down("cut by the test")
    bench.publisher.link_up(bench.lane, 131072)
    bench.publisher.down("closed: PRECONDITION_FAILED - message size 200 is larger than configured max size 100")
    assert large.outcomes == [504]


def test_the_trouble_of_a_partition_is_its_devices_alone() -> None:
    publisher = Publisher("predictions.3", 10, 1000, 10.0, lambda: 0.0, lambda: 0.0, partition=3)
    trouble = publisher.trouble()
    assert trouble is not None
    assert (trouble.reason, str(trouble)[:13]) == ("partition_down", "the partition")
