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
    """Items by delivery tag. The order of the dict is the order of publishing, and so of age."""

    __slots__ = ("_next_tag", "_published")

    def __init__(self) -> None:
        self._published: dict[int, T] = {}
        self._next_tag = 1

    def __len__(self) -> int:
        return len(self._published)

    def add(self, item: T) -> None:
        """Note that the next message of the channel is `item`'s."""
        self._published[self._next_tag] = item
        self._next_tag += 1

    def settle(self, confirms: Iterable[Confirm]) -> list[tuple[T, bool]]:
        """Take out what these confirms settle, each with whether the broker has it; tags settled before are ignored."""
        published = self._published
        settled = []
        for tag, multiple, ok in confirms:
            if multiple:
                for lower in list(takewhile(tag.__gt__, published)):
                    settled.append((published.pop(lower), ok))
            if tag in published:
                settled.append((published.pop(tag), ok))
        return settled

    def oldest(self) -> T | None:
        """Return what waits longest; None when nothing does."""
        return next(iter(self._published.values()), None)

    def take_oldest_while(self, condition: Callable[[T], bool]) -> list[T]:
        """Take out the oldest for which `condition` holds. Their tags stay used: late confirms are ignored."""
        tags = list(takewhile(lambda tag: condition(self._published[tag]), self._published))
        return [self._published.pop(tag) for tag in tags]

    def take(self) -> list[T]:
        """Take out everything, oldest first: the channel is gone, and the next one counts from 1."""
        taken = list(self._published.values())
        self._published = {}
        self._next_tag = 1
        return taken
