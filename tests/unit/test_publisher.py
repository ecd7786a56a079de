"""The publisher: which outcome each event has, in which message it travels, and when it is refused."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.amqp.codec import Confirm, Part, PublishEncoder, packed_seconds
from common.errors import NotConfirmed, OutcomeUnknown, TooLarge, Unavailable
from common.producer.metrics import Counters
from common.producer.publisher import GROUP_BYTES, Publication, Publisher, PublisherLimits
from tests.support.published import Published, published

FRAME_MAX = 131_072
LINE_BYTES = 49  # that a line of a message adds to its event


class Lane:
    """A connection that keeps what was sent, one item for each write."""

    def __init__(self) -> None:
        self.congested = False
        self.sent: list[bytes] = []
        self.failed = ""

    def send(self, parts: Iterable[Part]) -> None:
        self.sent.append(b"".join(parts))

    def fail(self, reason: str) -> None:
        self.failed = reason

    @property
    def messages(self) -> list[Published]:
        return published(b"".join(self.sent))

    @property
    def groups(self) -> list[list[int]]:
        """Return the numbers of the events of each message."""
        return [[int(event_id) for event_id in message.event_ids] for message in self.messages]


class Event(Publication):
    def __init__(self, body: bytes, message_id: bytes) -> None:
        self.body = body
        self.message_id = message_id
        self.rows = 1
        self.outcomes: list[str | int] = []

    def confirmed(self) -> None:
        self.outcomes.append("confirmed")

    def failed(self, error: NotConfirmed) -> None:
        self.outcomes.append(
            503 if isinstance(error, Unavailable) else 504 if isinstance(error, OutcomeUnknown) else 413
        )


class Bench:
    """A publisher with a lane, and with a clock and turns of the event loop that a test moves."""

    def __init__(self, max_unconfirmed: int = 100, max_bytes: int = 10_000_000, events_per_message: int = 64) -> None:
        self.time = 1000.0
        self.counters = Counters()
        self.waits: list[float] = []  # for a confirm, in seconds
        self.counters.confirm_seconds.observe = self.waits.append
        self._soon: list[Callable[[], None]] = []
        limits = PublisherLimits(max_unconfirmed, max_bytes, 10.0, events_per_message)
        self.publisher = Publisher("q", limits, lambda: self.time, lambda: self.time, self._soon.append, self.counters)
        self.lane = self.link_up()

    def counted(self) -> list[float]:
        """Messages, events, predictions and bytes that were confirmed."""
        its = self.counters
        return [its.metrics.values[each] for each in (its.messages, its.events, its.predictions, its.event_bytes)]

    def link_up(self, frame_max: int = FRAME_MAX) -> Lane:
        self.lane = Lane()
        self.publisher.link_up(self.lane, frame_max)
        return self.lane

    def end_turn(self) -> None:
        while self._soon:
            self._soon.pop(0)()

    def wait(self, seconds: float) -> None:
        """Let time pass, and the sweeps of that time: one that comes late counts nothing against the broker."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(end, self.time + 0.1)
            self.publisher.sweep()

    def gather(self, number: int = 0, size: int = 20) -> Event:
        """Publish an event, in the same turn as the next one."""
        event = Event(b'{"n":"' + b"x" * (size - 8) + b'"}', b"%032d" % number)
        self.publisher.publish(event)
        return event

    def publish(self, number: int = 0, size: int = 20) -> Event:
        """Publish an event in a turn of its own."""
        event = self.gather(number, size)
        self.end_turn()
        return event

    def together(self, *numbers: int, size: int = 20) -> list[Event]:
        """Publish events in one turn."""
        events = [self.gather(number, size) for number in numbers]
        self.end_turn()
        return events

    def confirm(self, tag: int, multiple: bool = False, ok: bool = True) -> None:
        self.publisher.confirms([Confirm(tag, multiple, ok)])


def test_an_event_is_confirmed_only_by_its_own_confirm() -> None:
    bench = Bench()
    first, second = bench.publish(1), bench.publish(2)
    bench.publisher.confirms([Confirm(2, False, True)])
    assert (first.outcomes, second.outcomes) == ([], ["confirmed"])
    assert bench.publisher.unconfirmed == 1


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.booleans()), max_size=40), st.integers(1, 30))
def test_every_event_gets_exactly_one_outcome(confirms: list[tuple[int, bool, bool]], count: int) -> None:
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
    bench = Bench()
    event = bench.publish()
    bench.wait(9.9)
    assert event.outcomes == []
    bench.wait(0.2)
    bench.publisher.confirms([Confirm(1, False, True)])
    assert event.outcomes == [504]


def test_a_link_without_one_confirm_is_given_up() -> None:
    bench = Bench()
    bench.publish()
    bench.wait(4.9)
    bench.publish()
    bench.time += 1
    bench.publisher.confirms([Confirm(2, False, True)])
    bench.wait(4.2)
    assert bench.lane.failed == ""
    bench.publish()
    bench.wait(10.1)
    assert "confirm" in bench.lane.failed


def test_a_stall_ends_though_nothing_is_in_flight_any_more() -> None:
    """The last event times out between two acks, so no confirm of this link can end it."""
    bench = Bench()
    bench.publish()
    bench.wait(1)
    first = bench.publish()
    bench.wait(2)
    bench.publisher.confirms([Confirm(1, False, True)])
    bench.wait(9)
    assert first.outcomes == [504]
    assert "confirmed nothing" in bench.lane.failed


def test_a_blocked_broker_is_waited_for_not_given_up() -> None:
    bench = Bench()
    event = bench.publish()
    bench.publisher.blocked("low on memory")
    bench.wait(10.1)
    assert (event.outcomes, bench.lane.failed) == ([504], "")


def test_events_in_flight_at_a_loss_are_published_again_first() -> None:
    """They have the same message ids."""
    bench = Bench()
    events = [bench.publish(number) for number in (1, 2, 3)]
    bench.publisher.confirms([Confirm(2, False, True)])
    bench.publisher.down("cut")
    bench.publisher.confirms([Confirm(1, False, True)])  # of the old channel: it means nothing now
    assert events[0].outcomes == []
    second = bench.link_up()
    new = bench.publish(4)
    assert second.groups == [[1, 3], [4]]
    bench.publisher.confirms([Confirm(1, True, True)])
    assert [event.outcomes for event in (*events, new)] == [["confirmed"]] * 3 + [[]]
    bench.publisher.confirms([Confirm(2, False, True)])
    assert new.outcomes == ["confirmed"]


def test_held_events_keep_their_deadline() -> None:
    bench = Bench()
    event = bench.publish()
    bench.publisher.down("cut")
    bench.wait(10.1)
    assert event.outcomes == [504]
    assert bench.link_up().sent == []


@pytest.mark.parametrize("trouble", ["away", "blocked", "count", "bytes", "congested"])
def test_what_cannot_be_sent_is_refused_with_its_reason(trouble: str) -> None:
    """It is refused at once."""
    bench = Bench(max_unconfirmed=2, max_bytes=100)
    publisher = bench.publisher
    assert publisher.health.trouble is None
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
        assert publisher.health.trouble is None, "a full window that moves is not trouble"
    else:
        assert str(publisher.health.trouble) == str(refusal.value)
    if trouble == "blocked":
        assert "low on memory" in str(refusal.value)


def test_a_drain_that_takes_too_long_answers_everything() -> None:
    bench = Bench()
    sent = bench.publish(1)
    bench.publisher.down("cut")
    bench.link_up()
    held = bench.publish(2)
    gathered = bench.gather(3)
    bench.publisher.close()
    bench.end_turn()
    assert [event.outcomes for event in (sent, held, gathered)] == [[504]] * 3
    assert (bench.publisher.unconfirmed, bench.publisher.unconfirmed_bytes) == (0, 0)


def test_nothing_is_published_after_the_end_of_a_drain() -> None:
    """Confirms of the same channel can still come, with the tags of events that were answered long ago."""
    bench = Bench()
    bench.publish(1)
    bench.publisher.close()
    written = list(bench.lane.sent)
    for _ in ("the same link", "a new link"):
        with pytest.raises(Unavailable) as refusal:
            bench.publish(2)
        assert refusal.value.reason == "shutting_down"
        bench.confirm(1, multiple=True)
        assert bench.lane.sent == written
        bench.publisher.down("cut")
        bench.link_up()
        written = []


def test_a_nack_of_a_republished_event_is_unknown() -> None:
    """The broker may have stored its first copy."""
    bench = Bench()
    event = bench.publish()
    bench.publisher.down("cut")
    bench.link_up()
    bench.publisher.confirms([Confirm(1, False, False)])
    assert event.outcomes == [504]


def test_a_stall_is_logged_and_refused_and_one_confirm_ends_it() -> None:
    bench = Bench()
    bench.publish(), bench.publish()
    bench.wait(6)
    assert bench.publisher.health.is_stalled
    with pytest.raises(Unavailable, match="confirms no events"):
        bench.publish()
    bench.publisher.confirms([Confirm(1, False, True)])
    assert (bench.publisher.health.is_stalled, bench.publisher.health.trouble) == (False, None)


def test_our_own_lateness_is_not_the_brokers_silence() -> None:
    """The confirms wait in the socket while our loop is held up: the first sweep after that gives up on nothing."""
    bench = Bench()
    event = bench.publish()
    bench.time += 60
    bench.publisher.sweep()
    assert (event.outcomes, bench.lane.failed, bench.publisher.health.is_stalled) == ([], "", False)
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


def test_only_nacks_take_a_new_link_at_times() -> None:
    """A new link helps against a bug of RabbitMQ 3.10, not against a queue that is full."""
    bench, lived = Bench(), []
    for _ in range(4):
        bench.lane.failed, began, tag = "", bench.time, 0
        while not bench.lane.failed:
            if bench.publisher.health.trouble is None:
                tag += 1
                assert bench.publish().outcomes == []
                bench.publisher.confirms([Confirm(tag, False, False)])
            bench.wait(0.1)
        lived.append(round(bench.time - began))
        assert "nack" in bench.lane.failed
        bench.publisher.down(bench.lane.failed)
        bench.link_up()
        assert bench.publisher.health.trouble is None, "the new one has shown no trouble"
    assert lived == [10] * 4


def test_a_nack_among_confirms_is_not_a_stall() -> None:
    bench = Bench()
    for number in range(1, 101):
        bench.publish()
        bench.publisher.confirms([Confirm(number, False, number % 2 == 0)])
        bench.wait(0.1)
    assert (bench.lane.failed, bench.publisher.health.is_stalled) == ("", False)


@pytest.mark.parametrize("reason", ["closed: ACCESS_REFUSED - access refused", "refused user (ACCESS_REFUSED)"])
def test_what_a_user_may_not_publish_is_answered_at_once(reason: str) -> None:
    """No new link helps, and of several in flight, nobody knows which ones the broker accepted."""
    bench = Bench()
    events = [bench.publish(number) for number in (1, 2)]
    bench.publisher.down(reason)
    assert [event.outcomes for event in events] == [[504], [504]]
    assert (bench.publisher.unconfirmed, bench.publisher.unconfirmed_bytes) == (0, 0)


def test_a_failure_heard_while_going_down_publishes_nothing() -> None:
    """A batch publishes its next event as soon as one fails, but not on a link that is gone."""
    bench = Bench()
    refused = []

    class Next(Event):
        def failed(self, error: NotConfirmed) -> None:
            with pytest.raises(Unavailable) as why:
                bench.publish()
            refused.append(why.value.reason)

    bench.publisher.publish(Next(b"x", b"%032d" % 0))
    bench.end_turn()
    bench.publisher.down("closed: ACCESS_REFUSED")
    assert refused == ["broker_away"]
    assert bench.publisher.unconfirmed == 0


def test_an_event_above_the_brokers_limit_is_refused() -> None:
    """It fails at once if it was what closed the channel; the others go out again."""
    bench = Bench()
    large, small = bench.publish(1, size=200), bench.publish(2)
    bench.publisher.down("closed: PRECONDITION_FAILED - message size 200 is larger than configured max size 100")
    assert (large.outcomes, small.outcomes) == ([413], [])
    bench.link_up()
    with pytest.raises(TooLarge):
        bench.publish(size=101)


def test_a_republished_event_above_the_brokers_limit_is_unknown() -> None:
    """The broker may have accepted its first copy: 413 would say that it is not stored."""
    bench = Bench()
    large = bench.publish(1, size=200)
    bench.publisher.down("cut by the test")
    bench.link_up()
    bench.publisher.down("closed: PRECONDITION_FAILED - message size 200 is larger than configured max size 100")
    assert large.outcomes == [504]


def test_the_trouble_of_a_partition_is_its_devices_alone() -> None:
    limits = PublisherLimits(10, 1000, 10.0, 64)
    publisher = Publisher("q.3", limits, lambda: 0.0, lambda: 0.0, list[Callable[[], None]]().append, Counters(), 3)
    trouble = publisher.health.trouble
    assert trouble is not None
    assert (trouble.reason, str(trouble)[:13]) == ("partition_down", "the partition")


# Several events in one message


def test_one_event_in_a_turn_is_published_as_before() -> None:
    bench = Bench()
    event = bench.publish(1)
    as_ever = PublishEncoder("q", FRAME_MAX).encode(event.body, event.message_id, packed_seconds(1000))
    assert bench.lane.sent == [b"".join(as_ever)]


def test_the_events_of_one_turn_are_lines_of_one_message() -> None:
    """One write, in the order of arrival; its own id names the message."""
    bench = Bench()
    first, second = bench.together(2, 1)
    assert len(bench.lane.sent) == 1
    (message,) = bench.lane.messages
    assert message.content_type == "application/x-ndjson"
    assert message.body == b"".join(
        b'{"message_id":"%b",%b\n' % (event.message_id, event.body[1:]) for event in (first, second)
    )
    assert uuid.UUID(message.message_id.decode()).version == 4
    assert all(json.loads(line)["n"] for line in message.body.splitlines())


@pytest.mark.parametrize(
    ("size", "events_per_message", "frame_max", "most"),
    [
        (20, 1, FRAME_MAX, 1),
        (20, 3, FRAME_MAX, 3),
        (20, 1000, FRAME_MAX, 10),
        (GROUP_BYTES // 4 - LINE_BYTES, 64, FRAME_MAX, 4),
        (GROUP_BYTES // 4 - LINE_BYTES, 64, 0, 4),
        (GROUP_BYTES // 4 - LINE_BYTES + 1, 64, FRAME_MAX, 3),
        (4096 // 4 - LINE_BYTES - 2, 64, 4096, 4),
        (4096 // 4 - LINE_BYTES - 1, 64, 4096, 3),
        (GROUP_BYTES, 64, FRAME_MAX, 1),
        (200_000, 64, FRAME_MAX, 1),
    ],
)
def test_a_group_is_bounded_in_events_and_bytes(size: int, events_per_message: int, frame_max: int, most: int) -> None:
    bench = Bench(events_per_message=events_per_message)
    bench.link_up(frame_max)
    bench.together(*range(10), size=size)
    groups = bench.lane.groups
    assert [number for group in groups for number in group] == list(range(10)), "in the order of arrival"
    assert {len(group) for group in groups[:-1]} | {most} == {most}
    assert len(groups[-1]) <= most


def test_a_large_event_among_small_ones_goes_alone() -> None:
    bench = Bench()
    bench.gather(1), bench.gather(2), bench.gather(3, size=GROUP_BYTES), bench.gather(4)
    bench.end_turn()
    assert bench.lane.groups == [[1, 2], [3], [4]]


@pytest.mark.parametrize(("ok", "outcome"), [(True, "confirmed"), (False, 503)])
def test_a_confirm_or_nack_holds_for_each_event_of_its_message(ok: bool, outcome: str | int) -> None:
    bench = Bench()
    first, later = bench.together(1, 2, 3), bench.together(4, 5)
    assert (bench.publisher.unconfirmed, bench.counted()) == (5, [0, 0, 0, 0]), "the window counts events"
    bench.confirm(1, ok=ok)
    assert [event.outcomes for event in (*first, *later)] == [[outcome]] * 3 + [[]] * 2
    assert (bench.publisher.unconfirmed, bench.publisher.unconfirmed_bytes) == (2, 40)
    bench.confirm(1, ok=True)
    assert bench.counted() == ([1, 3, 3, 60] if ok else [0, 0, 0, 0])
    assert bench.waits == [0.0] * 3 * ok


def test_a_group_without_the_event_that_timed_out_goes_on() -> None:
    """It can be confirmed as it is, or be published again on a new link without that event."""
    bench = Bench()
    early = bench.publish(1)
    bench.wait(4)
    late = bench.publish(2)
    bench.publisher.down("cut")
    assert bench.link_up().groups == [[1, 2]]
    bench.wait(6.1)
    assert (early.outcomes, late.outcomes) == ([504], [])
    bench.publisher.down("cut")
    assert bench.link_up().groups == [[2]]
    bench.confirm(1)
    assert (early.outcomes, late.outcomes) == ([504], ["confirmed"])


def test_a_group_too_large_for_the_broker_is_sent_alone() -> None:
    """Each event is then judged on its own: the others of a group are stored."""
    bench = Bench()
    small, large = bench.together(1, 2), bench.together(3, size=200)
    bench.publisher.down("closed: PRECONDITION_FAILED - message size 138 is larger than configured max size 100")
    assert [event.outcomes for event in (*small, *large)] == [[], [], [413]]
    bench.link_up()
    more = bench.together(4, 5)
    assert bench.lane.groups == [[1], [2], [4], [5]]
    bench.confirm(4, multiple=True)
    assert [event.outcomes for event in (*small, *more)] == [["confirmed"]] * 4


def test_events_gathered_when_the_link_is_lost_are_held() -> None:
    bench = Bench()
    sent = bench.publish(1)
    gathered = [bench.gather(2), bench.gather(3)]
    bench.publisher.down("cut")
    bench.end_turn()
    assert bench.publisher.unconfirmed == 3
    assert bench.link_up().groups == [[1, 2, 3]], "oldest first"
    bench.confirm(1, ok=False)
    assert [event.outcomes for event in (sent, *gathered)] == [[504], [503], [503]], "two were never sent before"


def test_half_of_the_window_is_kept_for_single_events() -> None:
    bench = Bench(max_unconfirmed=5)
    bench.together(1, 2)
    assert bench.publisher.has_room_for_batch()
    resumed: list[int] = []
    bench.gather(3)
    assert not bench.publisher.has_room_for_batch(), "what is gathered counts"
    bench.publisher.call_when_there_is_room(lambda: resumed.append(1))
    bench.end_turn()
    bench.confirm(1)
    assert resumed == [1]


class Broker:
    """The broker at the other end of the publisher of `bench`. It stores what it acks."""

    def __init__(self, bench: Bench) -> None:
        self.stored: set[bytes] = set()
        self._bench = bench
        self._settled: dict[Lane, set[int]] = {}

    def confirm(self, tag: int, multiple: bool, ok: bool) -> None:
        """Confirm what was published on the present channel, so far as it exists and has no confirm yet."""
        lane = self._bench.lane
        messages, settled = lane.messages, self._settled.setdefault(lane, set())
        tag = min(tag, len(messages))
        for covered in range(1 if multiple else max(tag, 1), tag + 1):
            if covered not in settled and ok:
                self.stored.update(messages[covered - 1].event_ids)
            settled.add(covered)
        if tag:
            self._bench.confirm(tag, multiple, ok)


SIZES = st.sampled_from([20, 20, 20, 200, GROUP_BYTES // 2, GROUP_BYTES])
TURN = st.tuples(st.just("publish"), st.lists(SIZES, min_size=1, max_size=6), st.sampled_from([True, True, False]))
CONFIRM = st.tuples(st.just("confirm"), st.integers(1, 8), st.booleans(), st.sampled_from([True, True, False]))
DOWN = st.tuples(
    st.just("down"), st.sampled_from(["cut", "cut", "larger than configured max size 100", "ACCESS_REFUSED"])
)
UP = st.tuples(st.just("up"))
WAIT = st.tuples(st.just("wait"), st.floats(0.1, 4.9))
STEPS = st.lists(st.one_of(TURN, TURN, CONFIRM, CONFIRM, DOWN, UP, UP, WAIT), max_size=40)


@given(STEPS, st.sampled_from([1, 2, 3, 64]), st.booleans())
def test_each_event_has_one_outcome_and_200_only_if_stored(
    steps: list[tuple[Any, ...]], events_per_message: int, is_stopped: bool
) -> None:
    """That holds in any interleaving of events, groups, confirms, nacks, losses, time-outs, and the end of a drain."""
    bench = Bench(max_unconfirmed=20, events_per_message=events_per_message)
    broker, numbers, events = Broker(bench), count(), list[Event]()

    def act(step: str, *values: Any) -> None:
        if step == "publish":
            sizes, whole_turn = values
            for size in sizes:
                with contextlib.suppress(Unavailable, TooLarge):
                    events.append(bench.gather(next(numbers), size))
            if whole_turn:
                bench.end_turn()
        elif step == "confirm":
            broker.confirm(*values)
        elif step == "down":
            bench.publisher.down(*values)
        elif step == "up" and not bench.publisher.connected:
            bench.end_turn()
            bench.link_up()
        elif step == "wait":
            bench.end_turn()
            bench.wait(*values)

    for step in (*steps, ("up",)):
        act(*step)
        assert all(len(event.outcomes) <= 1 for event in events)
        assert all(event.message_id in broker.stored for event in events if event.outcomes == ["confirmed"])
        assert bench.publisher.unconfirmed == sum(not event.outcomes for event in events)
    bench.end_turn()
    in_flight = [event.message_id for event in events if not event.outcomes]
    on_the_wire = [event_id for message in bench.lane.messages for event_id in message.event_ids]
    assert [event_id for event_id in on_the_wire if event_id in in_flight] == in_flight, "each once, oldest first"
    if is_stopped:
        bench.publisher.close()
        broker.confirm(8, True, True)
    bench.wait(11)
    assert all(len(event.outcomes) == 1 for event in events)
    assert (bench.publisher.unconfirmed, bench.publisher.unconfirmed_bytes) == (0, 0)
