"""The confirm window: which item a confirm settles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.amqp.codec import Confirm
from common.amqp.window import ConfirmWindow


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), max_size=30), st.integers(1, 20))
def test_each_item_is_settled_once_by_its_first_confirm(confirms: list[tuple[int, bool, bool]], count: int) -> None:
    settled: list[tuple[int, bool]] = []
    window = ConfirmWindow[int](lambda item, ok: settled.append((item, ok)))
    for number in range(1, count + 1):
        window.add(number)
    window.confirms([Confirm(*each) for each in confirms])
    expected: dict[int, bool] = {}
    for tag, multiple, ok in confirms:
        for covered in range(1 if multiple else tag, min(tag, count) + 1):
            expected.setdefault(covered, ok)
    assert dict(settled) == expected
    assert len(settled) == len(expected)
    assert sorted([*expected, *window.take()]) == list(range(1, count + 1))


def test_a_new_channel_counts_from_one() -> None:
    settled: list[tuple[str, bool]] = []
    window = ConfirmWindow[str](lambda item, ok: settled.append((item, ok)))
    for item in "ab":
        window.add(item)
    assert window.take() == ["a", "b"]
    window.add("c")
    window.confirms([Confirm(2, False, True)])
    assert settled == []
    window.confirms([Confirm(1, False, True)])
    assert settled == [("c", True)]


def test_a_late_confirm_of_what_was_given_up_means_nothing() -> None:
    settled: list[tuple[int, bool]] = []
    window = ConfirmWindow[int](lambda item, ok: settled.append((item, ok)))
    for number in (1, 2, 3):
        window.add(number)
    assert window.take_oldest_while(lambda item: item < 3) == [1, 2]
    window.confirms([Confirm(3, True, False)])
    assert settled == [(3, False)]
