"""The confirm window: what is published on a channel and not confirmed yet. Pure: no clock, no I/O.

A channel counts its delivery tags up from 1, and confirms come in any order; `multiple` covers every lower tag that is
not settled yet (RabbitMQ, publisher confirms). One window serves one channel at a time; call `take` between two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Generic, TypeVar

from common.amqp.codec import Confirm

T = TypeVar("T")


class ConfirmWindow(Generic[T]):
    """Items by delivery tag. `settle(item, ok)` is called once for each item that the broker confirms."""

    __slots__ = ("_next_tag", "_settle", "unconfirmed")

    def __init__(self, settle: Callable[[T, bool], None]) -> None:
        self.unconfirmed: dict[int, T] = {}  # in the order of publishing; always the same dict
        self._next_tag = 1
        self._settle = settle

    def add(self, item: T) -> None:
        """Give `item` the delivery tag of the next message on the channel."""
        self.unconfirmed[self._next_tag] = item
        self._next_tag += 1

    def confirms(self, confirms: Iterable[Confirm]) -> None:
        """Settle what `confirms` cover. Tags that were settled before are ignored."""
        unconfirmed, settle = self.unconfirmed, self._settle
        for tag, multiple, ok in confirms:
            if multiple:
                for lower in list(takewhile(tag.__gt__, unconfirmed)):
                    settle(unconfirmed.pop(lower), ok)
            item = unconfirmed.pop(tag, None)
            if item is not None:
                settle(item, ok)

    def oldest(self) -> T | None:
        """Return the item that has waited longest; None without one."""
        return next(iter(self.unconfirmed.values()), None)

    def take_oldest_while(self, condition: Callable[[T], bool]) -> list[T]:
        """Remove and return the oldest items, as far as `condition` holds. Late confirms of them are ignored."""
        tags = list(takewhile(lambda tag: condition(self.unconfirmed[tag]), self.unconfirmed))
        return [self.unconfirmed.pop(tag) for tag in tags]

    def take(self) -> list[T]:
        """Remove and return everything, oldest first, when the channel is gone. The next one counts from 1."""
        taken = list(self.unconfirmed.values())
        self.unconfirmed.clear()
        self._next_tag = 1
        return taken
