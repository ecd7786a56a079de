"""Turns on the loop: an owner that has worked long waits for the others. Time is a number that the jobs advance."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.http.turns import FORWARD_TURNS, TURN_SECONDS, Job, Turns


class Loop:
    """A loop without I/O, and its clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.soon: list[Callable[[], None]] = []
        self.done: list[str] = []
        self.turns = Turns(self.soon.append, lambda: self.now)

    def job(self, name: str, stages: int, seconds: float) -> Job:
        for _ in range(stages):
            self.now += seconds
            self.done.append(name)
            yield None

    def turn(self) -> None:
        soon, self.soon[:] = list(self.soon), []
        for call in soon:
            call()

    def run(self) -> None:
        while self.soon:
            self.turn()


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_a_turn_ends_with_the_stage_that_is_too_long(loop: Loop) -> None:
    for owner in ("a", "b"):
        loop.turns.add(owner, loop.job(owner, 3, 0.03))
    loop.turn()
    assert loop.done == ["a"]
    loop.run()
    assert loop.done == ["a", "b", "a", "b", "a", "b"]


def test_a_newcomer_goes_before_those_that_had_a_slice(loop: Loop) -> None:
    for owner in ("a", "b", "c"):
        loop.turns.add(owner, loop.job(owner, 2, 0.03))
    for _ in range(3):
        loop.turn()
    loop.turns.add("new", loop.job("new", 1, 0.001))
    loop.turn()
    assert loop.done == ["a", "b", "c", "new", "a"]


def test_newcomers_without_end_keep_nobody_waiting_forever(loop: Loop) -> None:
    """Each turn of the loop brings more of them than it has time for. The others still take their turns."""

    def short() -> Job:
        loop.now += 2 * TURN_SECONDS
        yield from ()

    for owner in ("a", "b"):
        loop.turns.add(owner, loop.job(owner, 3, 2 * TURN_SECONDS))
    for number in range(5 * FORWARD_TURNS):
        loop.turns.add(f"new {number}", short())
        loop.turns.add(f"and {number}", short())
        loop.turn()
    assert loop.done == ["a", "b", "a", "b", "a", "b"]


def test_the_jobs_of_one_owner_run_in_order(loop: Loop) -> None:
    for name in ("first", "second"):
        loop.turns.add("owner", loop.job(name, 2, 0.004))
    loop.run()
    assert loop.done == ["first", "first", "second", "second"]


def test_a_job_that_waits_keeps_nobody(loop: Loop) -> None:
    resumes: list[Callable[[], None]] = []

    def waiting() -> Job:
        yield resumes.append
        loop.done.append("resumed")

    loop.turns.add("a", waiting())
    loop.turns.add("a", loop.job("behind", 1, 0.001))
    loop.run()
    assert loop.done == ["behind"]
    resumes.pop()()
    loop.run()
    assert loop.done == ["behind", "resumed"]


def test_what_arrives_waits_only_while_a_turn_is_spent(loop: Loop) -> None:
    assert loop.now < loop.turns.ends
    loop.turns.worked_since(loop.now - 2 * TURN_SECONDS)
    assert loop.now > loop.turns.ends
    loop.turn()
    assert loop.now < loop.turns.ends


def test_a_job_that_fails_ends_alone(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Job:
        yield None
        raise KeyError("x")

    loop.turns.add("a", broken())
    loop.turns.add("b", loop.job("b", 1, 0.001))
    loop.run()
    assert loop.done == ["b"]
    assert "a bug" in caplog.text
