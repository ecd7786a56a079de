"""What a run measured, and medians of it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

PREDLOG, BASELINE = "predlog", "FastAPI + aio-pika"
SINGLE = "predlog, one event a message"  # EVENTS_PER_MESSAGE=1
BRIDGE, BRIDGE_TUNED = "mq-bridge (Rust)", "mq-bridge (Rust), tuned"
FLOOR, LIMIT = "the floor", "RabbitMQ alone"

SMALL, IMAGES = "small events", "5 images of 20 KB"
IMAGES_CASE = f"32 connections, {IMAGES}"  # of the producer; its small events have the number of connections only
FEW, MANY = "32 connections", "256 connections"
HALF_LOAD = f"{SMALL}, half of the baseline's best"


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement. Units are in the names of `values`: rate (per second), cpu_us, p50_ms, memory_mb …"""

    section: str
    case: str
    subject: str
    values: dict[str, float]


@dataclass(slots=True)
class Results:
    records: list[Record] = field(default_factory=list)

    def cases(self, section: str) -> list[str]:
        """The cases of a section, in the order they were first measured."""
        return list(dict.fromkeys(r.case for r in self.records if r.section == section))

    def subjects(self, section: str, case: str) -> list[str]:
        return list(dict.fromkeys(r.subject for r in self.records if (r.section, r.case) == (section, case)))

    def all(self, section: str, case: str, subject: str, value: str) -> list[float]:
        return list(self._values(section, case, subject, value))

    def median(self, section: str, case: str, subject: str, value: str) -> float | None:
        """The median over the rounds; None if it was not measured."""
        found = self.all(section, case, subject, value)
        return statistics.median(found) if found else None

    def ratio(self, section: str, case: str, value: str, other: str = BASELINE) -> float | None:
        """predlog ÷ `other`, of the medians."""
        ours = self.median(section, case, PREDLOG, value)
        theirs = self.median(section, case, other, value)
        return ours / theirs if ours is not None and theirs else None

    def _values(self, section: str, case: str, subject: str, value: str) -> Iterator[float]:
        for record in self.records:
            if (record.section, record.case, record.subject) == (section, case, subject) and value in record.values:
                yield record.values[value]
