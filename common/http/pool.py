"""The bounds that the connections of a server keep together: places and memory. Pure.

The pool decides whose connections end, and returns them. The caller ends them.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from common.http.phases import HANDSHAKE, HEAD, IDLE, LINGERING, Phase

# A client without progress for this long can lose its place or its memory to another. A lost packet delays for less.
SILENT_SECONDS = 1.0
# Looking at all of 16,000 connections takes about 5 ms, too long to do for each newcomer.
LOOK_SECONDS = 0.1
# Connections that gave up their place and still read their answer. Beyond it, the first of them is cut off.
MOST_LEAVING = 64

_WITHOUT_A_REQUEST = (LINGERING, HANDSHAKE, IDLE, HEAD)


class Member(Protocol):
    """What the pool sees of a connection."""

    phase: Phase
    held_bytes: int  # of memory, for its client

    def __hash__(self) -> int: ...

    def silent_seconds(self, now: float) -> float:
        """Return for how long the client has neither sent nor taken anything; 0 while it is not the client's turn."""


M = TypeVar("M", bound=Member)


class Pool(Generic[M]):
    """The connections of a server. `held_bytes` is the memory of all, with what requests hold until their answer."""

    def __init__(self, places: int, memory_bytes: int) -> None:
        self.members: set[M] = set()
        self.held_bytes = 0
        self.refused = 0  # newcomers without a place, since the server last looked
        self._places = places
        self._memory_bytes = memory_bytes
        self._leaving: dict[M, None] = {}  # in the order in which they gave up their places
        self._silent: deque[M] = deque()  # who can lose a place; first who only lingers, then the longest silent
        self._holders: deque[M] = deque()  # who can lose memory, the largest first
        self._next_look = 0.0

    def join(self, newcomer: M, now: float) -> list[M]:
        """Add a connection. Return whose connections end for it: the longest silent, or else the newcomer's own."""
        self.members.add(newcomer)
        if len(self.members) - len(self._leaving) <= self._places:
            return []
        leaver = self.longest_silent(now) or newcomer
        self.refused += leaver is newcomer
        self._leaving[leaver] = None
        if len(self._leaving) <= MOST_LEAVING:
            return [leaver]
        first = next(iter(self._leaving))
        self.leave(first)
        return [leaver, first]

    def leave(self, member: M) -> None:
        """Remove a connection that has ended."""
        self.members.discard(member)
        self._leaving.pop(member, None)

    def longest_silent(self, now: float) -> M | None:
        """Return the connection without a request whose client has been silent longest, if any has been for long."""
        self._look(now)
        while self._silent:
            member = self._silent.popleft()
            if self._can_lose_place(member, now):
                return member
        return None

    def over_memory(self, asker: M, now: float) -> list[M]:
        """Return whose connections give up their memory: silent ones, the largest first, and the asker as the last.

        Empty while all together hold no more than they can.
        """
        giving: list[M] = []
        excess_bytes = self.held_bytes - self._memory_bytes
        if excess_bytes > 0:
            self._look(now)
        while excess_bytes > 0 and self._holders:
            member = self._holders.popleft()
            if member in self.members and member.silent_seconds(now) >= SILENT_SECONDS:
                giving.append(member)
                excess_bytes -= member.held_bytes
        return [*giving, asker] if excess_bytes > 0 else giving

    def _can_lose_place(self, member: M, now: float) -> bool:
        return (
            member.phase in _WITHOUT_A_REQUEST
            and member.silent_seconds(now) >= SILENT_SECONDS
            and member in self.members
            and member not in self._leaving
        )

    def _look(self, now: float) -> None:
        """Find who can lose something, unless the last look was a moment ago."""
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        silent = [each for each in self.members if each.silent_seconds(now) >= SILENT_SECONDS]
        silent.sort(key=lambda each: (each.phase is not LINGERING, -each.silent_seconds(now)))
        self._silent = deque(silent)
        self._holders = deque(sorted((each for each in silent if each.held_bytes), key=lambda each: -each.held_bytes))
