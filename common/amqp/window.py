"""The confirm window: what is published on one channel and not confirmed yet. Pure: no clock, no I/O.

A channel counts its delivery tags up from 1, and confirms come in any order; `multiple` covers every lower tag that is
not settled yet (RabbitMQ, publisher confirms). So a window belongs to one channel, from its first message to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Generic, TypeVar

from common.amqp.codec import Confirm

T = TypeVar("T")


class ConfirmWindow(Generic[T]):
    """The messages of one channel by delivery tag. Each channel has a window of its own."""

    __slots__ = ("_next_tag", "_unsettled")

    def __init__(self) -> None:
        self._unsettled: dict[int, T] = {}  # in the order of publishing
        self._next_tag = 1

    def add(self, message: T) -> None:
        """Give `message` the delivery tag of the next message on the channel."""
        self._unsettled[self._next_tag] = message
        self._next_tag += 1

    def settle(self, confirms: Iterable[Confirm]) -> list[tuple[T, bool]]:
        """Remove what `confirms` cover and is here; return each message with True for an ack, False for a nack."""
        unsettled = self._unsettled
        settled = []
        for tag, multiple, ok in confirms:
            if multiple:
                settled += [(unsettled.pop(lower), ok) for lower in list(takewhile(tag.__gt__, unsettled))]
            if tag in unsettled:
                settled.append((unsettled.pop(tag), ok))
        return settled

    def forget_oldest_while(self, condition: Callable[[T], bool]) -> None:
        """Remove the oldest messages, as far as `condition` holds. Late confirms of them are ignored."""
        for tag in list(takewhile(lambda tag: condition(self._unsettled[tag]), self._unsettled)):
            del self._unsettled[tag]
