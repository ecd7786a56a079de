"""The confirm window: what was published on a channel and is not confirmed yet. Pure: no clock, no I/O.

A channel counts its delivery tags up from 1, and confirms come in any order; `multiple` covers every lower tag that is
not settled yet (RabbitMQ, publisher confirms). One window serves one channel; a new channel begins with `take`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Generic, TypeVar

from common.amqp.codec import Confirm

T = TypeVar("T")


class ConfirmWindow(Generic[T]):
    """Items by delivery tag. `settle(item, ok)` is called once for each that the broker confirms."""

    __slots__ = ("_next_tag", "_settle", "unconfirmed")

    def __init__(self, settle: Callable[[T, bool], None]) -> None:
        self.unconfirmed: dict[int, T] = {}  # in the order of publishing, and so of age; this object for good
        self._next_tag = 1
        self._settle = settle

    def add(self, item: T) -> None:
        """Note that the next message of the channel is `item`'s."""
        self.unconfirmed[self._next_tag] = item
        self._next_tag += 1

    def confirms(self, confirms: Iterable[Confirm]) -> None:
        """Settle what these confirms cover; tags that were settled before are ignored."""
        unconfirmed, settle = self.unconfirmed, self._settle
        for tag, multiple, ok in confirms:
            if multiple:
                for lower in list(takewhile(tag.__gt__, unconfirmed)):
                    settle(unconfirmed.pop(lower), ok)
            item = unconfirmed.pop(tag, None)
            if item is not None:
                settle(item, ok)

    def oldest(self) -> T | None:
        """Return what waits longest; None when nothing does."""
        return next(iter(self.unconfirmed.values()), None)

    def take_oldest_while(self, condition: Callable[[T], bool]) -> list[T]:
        """Take out the oldest for which `condition` holds. Their tags stay used: late confirms are ignored."""
        tags = list(takewhile(lambda tag: condition(self.unconfirmed[tag]), self.unconfirmed))
        return [self.unconfirmed.pop(tag) for tag in tags]

    def take(self) -> list[T]:
        """Take out everything, oldest first: the channel is gone, and the next one counts from 1."""
        taken = list(self.unconfirmed.values())
        self.unconfirmed.clear()
        self._next_tag = 1
        return taken
