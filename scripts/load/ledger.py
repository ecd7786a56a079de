"""What was answered, event by event: one side of the proof. The CSV is the other. Pure.

It takes two bytes per event, so that a night of load fits into memory.
"""

from collections import Counter

CUT = 0
"""In place of a status: the connection ended, or nothing came in time."""

_LIMIT = 255


class Ledger:
    """`accepted[n]` and `unknown[n]` count the answers to event n that promise its rows, or leave them open."""

    def __init__(self) -> None:
        self.accepted = bytearray()
        self.unknown = bytearray()
        self.answers: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.accepted)

    def open(self) -> int:
        """Return the number of the next event, which has not been sent yet."""
        self.accepted.append(0)
        self.unknown.append(0)
        return len(self.accepted) - 1

    def record(self, number: int, status: int) -> None:
        """Record one answer. 503 and 4xx are refusals: nothing of that attempt may become a row."""
        self.answers[status] += 1
        if status == 200:
            self.accepted[number] = min(self.accepted[number] + 1, _LIMIT)
        elif status == CUT or (status >= 500 and status != 503):
            self.unknown[number] = min(self.unknown[number] + 1, _LIMIT)

    @property
    def accepted_events(self) -> int:
        return len(self.accepted) - self.accepted.count(0)
