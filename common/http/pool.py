"""The bounds that the connections of a server keep together: places and memory. Pure.

The pool decides which connections end, and returns them. The caller ends them.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from common.http.phases import HANDSHAKE, HEAD, IDLE, LINGERING, Phase

# A client without progress for this long can lose its place or its memory to another. A lost packet delays for less.
SILENT_SECONDS = 1.0
# Looking at all of 16,000 connections takes about 5 ms, too long to do for each newcomer.
LOOK_SECONDS = 0.1
# Connections beyond the limit that read why they are refused. Further ones are closed without an answer.
MOST_LEAVING = 64

_WITHOUT_A_REQUEST = frozenset({LINGERING, HANDSHAKE, IDLE, HEAD})


class Member(Protocol):
    phase: Phase
    held_bytes: int  # of memory, for its client

    def __hash__(self) -> int: ...
    def silent_seconds(self, now: float) -> float: ...


M = TypeVar("M", bound=Member)


class Pool(Generic[M]):
    """The connections of a server. `held_bytes` is the memory of all, with what requests hold until their answer."""

    def __init__(self, places: int, memory_bytes: int) -> None:
        self.members: set[M] = set()
        self.held_bytes = 0
        self.refused = 0  # newcomers without a place, until the server looks
        self._places = places
        self._memory_bytes = memory_bytes
        self._silent: deque[M] = deque()  # at the last look: first those that only linger, then the longest silent
        self._next_look = 0.0

    def join(self, newcomer: M, now: float) -> M | None:
        """Add a connection. Return the one that must end for it, if any: the longest silent, or else the newcomer."""
        self.members.add(newcomer)
        if len(self.members) <= self._places:
            return None
        leaver = self.longest_silent(now) or newcomer
        self.refused += leaver is newcomer
        return leaver

    def can_answer_refused(self) -> bool:
        """Return whether one more connection beyond the limit can stay for its answer."""
        return len(self.members) <= self._places + MOST_LEAVING

    def leave(self, member: M) -> None:
        """Remove a connection that has ended."""
        self.members.discard(member)
        self.held_bytes -= member.held_bytes

    def longest_silent(self, now: float) -> M | None:
        """Return the connection without a request whose client has been silent longest, if any has been for long."""
        while member := self._next_silent(now):
            if member.phase in _WITHOUT_A_REQUEST:
                return member
        return None

    def over_memory(self, asker: M, now: float) -> list[M]:
        """Return the connections that give up their memory: silent ones, the longest first, and the asker last.

        The list is empty while all together hold no more than they may.
        """
        giving: list[M] = []
        excess_bytes = self.held_bytes - self._memory_bytes
        while excess_bytes > 0:
            member = self._next_silent(now) or asker
            if member.held_bytes or member is asker:
                giving.append(member)
                excess_bytes -= member.held_bytes
            if member is asker:
                break
        return giving

    def _next_silent(self, now: float) -> M | None:
        """Return the next connection that was found silent. Look for them first, unless the last look is recent."""
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            silent = [each for each in self.members if each.silent_seconds(now) >= SILENT_SECONDS]
            silent.sort(key=lambda each: (each.phase is not LINGERING, -each.silent_seconds(now)))
            self._silent = deque(silent)
        while self._silent:
            member = self._silent.popleft()
            if member in self.members and member.silent_seconds(now) >= SILENT_SECONDS:
                return member
        return None
