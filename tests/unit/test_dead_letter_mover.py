"""The outcome of each copy that is published for the dead letters, and the end of a link that is of no use."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from common.amqp.codec import Confirm
from common.amqp.link import Link
from common.consumer.dead_letters import mover
from common.consumer.dead_letters.message import Copy
from common.consumer.dead_letters.mover import Nacked, Outbox
from tests.support.lane import FakeLane


def outbox_of(lane: FakeLane, frame_max: int = 0) -> Outbox:
    return Outbox(cast(Link, SimpleNamespace(lane=lane, frame_max=frame_max)))


A_COPY = Copy(b"header", b"bare", b"body")


async def test_a_confirm_settles_its_own_message_or_all_older() -> None:
    """A confirm settles its own message and multiple every older one."""
    lane = FakeLane()
    outbox = outbox_of(lane)
    futures = [outbox.publish("q", A_COPY) for _ in range(5)]
    outbox.confirms([Confirm(4, False, True)])
    assert [future.done() for future in futures] == [False, False, False, True, False]
    outbox.confirms([Confirm(2, True, False), Confirm(2, True, True), Confirm(3, True, True)])
    assert isinstance(futures[0].exception(), Nacked)
    assert isinstance(futures[1].exception(), Nacked)
    assert futures[2].exception() is None
    assert not futures[4].done()


async def test_a_lost_link_fails_everything_unconfirmed() -> None:
    """A lost link fails everything that is unconfirmed and all that follows."""
    lane = FakeLane()
    outbox = outbox_of(lane)
    before = outbox.publish("q", A_COPY)
    lane.fail("returned: NO_ROUTE")
    await asyncio.sleep(0)
    after = outbox.publish("q", A_COPY)
    assert [str(future.exception()) for future in (before, after)] == ["returned: NO_ROUTE"] * 2
    assert len(lane.sent) == 1


async def test_a_silent_broker_is_given_up_but_not_a_blocked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent broker is given up but not one that says it is blocked."""
    monkeypatch.setattr(mover, "CONFIRM_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(mover, "POLL_SECONDS", 0.01)
    lane = FakeLane()
    outbox = outbox_of(lane)
    future = outbox.publish("q", A_COPY)
    outbox.blocked("low on memory")
    waiting = asyncio.ensure_future(outbox.wait([future]))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    outbox.blocked("")
    await asyncio.wait_for(waiting, 5)
    assert "no confirm" in str(future.exception())


async def test_a_link_with_nothing_but_nacks_is_ended_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """RabbitMQ 3.10 never takes a message again on a channel that met a full queue; one ack starts the clock again."""
    now = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    lane = FakeLane()
    outbox = outbox_of(lane)
    for tag, ok in enumerate((False, True, False, False), 1):
        outbox.publish("q", A_COPY)
        outbox.confirms([Confirm(tag, False, ok)])
        now += mover.NACKS_SECONDS * 0.75
    assert lane.lost is None
    outbox.publish("q", A_COPY)
    outbox.confirms([Confirm(5, False, False)])
    assert lane.lost == "the broker refuses every copy (nack)"


async def test_a_large_copy_goes_out_in_frames_of_negotiated_size() -> None:
    """A large body goes out in frames of the negotiated size and a large header without its ballast."""
    lane = FakeLane()
    outbox = outbox_of(lane, frame_max=4096)
    outbox.publish("q", Copy(b"h" * 4089, b"bare", b"x" * 5000))
    sizes = []
    data = lane.sent[0]
    while data:
        size = int.from_bytes(data[3:7], "big") + 8
        sizes.append(size)
        assert data[size - 1] == 0xCE
        data = data[size:]
    assert sizes[1:] == [len(b"bare") + 8, 4096, 5000 - 4088 + 8]
