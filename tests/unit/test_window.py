"""The confirm window: which message a confirm settles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.amqp.codec import Confirm
from common.amqp.window import ConfirmWindow


def window_of(count: int) -> ConfirmWindow[int]:
    """A window whose messages are their delivery tags."""
    window = ConfirmWindow[int]()
    for number in range(1, count + 1):
        window.add(number)
    return window


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), max_size=30), st.integers(1, 20))
def test_each_message_is_settled_once_by_its_first_confirm(confirms: list[tuple[int, bool, bool]], count: int) -> None:
    window = window_of(count)
    settled = window.settle([Confirm(*each) for each in confirms])
    expected: dict[int, bool] = {}
    for tag, multiple, ok in confirms:
        for covered in range(1 if multiple else tag, min(tag, count) + 1):
            expected.setdefault(covered, ok)
    assert dict(settled) == expected
    assert len(settled) == len(expected)
    rest = [(number, True) for number in range(1, count + 1) if number not in expected]
    assert window.settle([Confirm(count, True, True)]) == rest


def test_a_tag_is_never_given_twice() -> None:
    """That holds whatever was removed or settled: a late confirm must not settle a later message."""
    window = window_of(2)
    window.forget_oldest_while(lambda _: True)
    window.add(3)
    assert list(window.settle([Confirm(2, True, True)])) == []
    assert list(window.settle([Confirm(3, False, True)])) == [(3, True)]


def test_a_late_confirm_of_what_was_given_up_means_nothing() -> None:
    window = window_of(3)
    window.forget_oldest_while(lambda number: number < 3)
    assert list(window.settle([Confirm(3, True, False)])) == [(3, False)]
