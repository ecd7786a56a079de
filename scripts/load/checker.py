"""The check of the answers against what is in the CSV. Pure: events, a ledger and byte streams in, a verdict out.

Rows are compared whole and as bytes, so that every part of the dialect counts.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO

from scripts.load.events import HEADER, Events, encode_row
from scripts.load.ledger import Ledger

_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 160


@dataclass(slots=True)
class Finding:
    """How often a fault was found, and the first few places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)


@dataclass(slots=True)
class Verdict:
    """The promise holds when all four findings are empty."""

    rows: int = 0
    lost: Finding = field(default_factory=Finding)  # answered 200, and not all rows are there
    duplicated: Finding = field(default_factory=Finding)  # a row more often than its event may be there
    torn: Finding = field(default_factory=Finding)  # an event with a part of its rows; bytes that are not a record
    foreign: Finding = field(default_factory=Finding)  # rows that nobody sent, or whose event was refused

    @property
    def findings(self) -> dict[str, Finding]:
        return {name: getattr(self, name) for name in ("lost", "duplicated", "torn", "foreign")}

    @property
    def holds(self) -> bool:
        return not any(finding.count for finding in self.findings.values())

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {finding.count}" for name, finding in self.findings.items())]
        lines += [f"{name}: {text}" for name, finding in self.findings.items() for text in finding.examples]
        return "\n".join(lines)


def check(events: Events, ledger: Ledger, files: Iterable[tuple[str, BinaryIO]]) -> Verdict:
    """Read every file of one CSV (the live one and the rotated ones, in any order) and judge every event."""
    verdict = Verdict()
    whole = bytearray(len(ledger))  # copies of event n that were found in one piece: nearly all
    pieces: dict[int, Counter[bytes]] = {}  # rows of event n found in any other way
    for name, stream in files:
        records = _records(stream, events.prefix)
        header = next(records, HEADER)  # a file may be empty
        if header != HEADER:
            verdict.torn.add(f"{name}: begins {_show(header)} instead of the header")
        for device_id, group in groupby(records, key=_device_id):
            rows = list(group)
            verdict.rows += len(rows)
            number = events.number(device_id)
            if number is None or number >= len(ledger):
                for row in rows:
                    # Half of an id with a row after it also has seven cells.
                    whole_id = number is not None or events.prefix not in device_id
                    _judge_unknown_row(verdict, name, row, whole_id)
            elif rows == events.rows(number) and whole[number] < 255:
                whole[number] += 1
            else:
                _count_pieces(verdict, name, rows, events.rows(number), pieces.setdefault(number, Counter()))
    for number in range(len(ledger)):
        _judge_event(verdict, events, ledger, number, whole[number], pieces.get(number))
    return verdict


def _judge_event(
    verdict: Verdict, events: Events, ledger: Ledger, number: int, whole: int, pieces: Counter[bytes] | None
) -> None:
    accepted, unknown = ledger.accepted[number], ledger.unknown[number]
    keyed = events.key(number) is not None
    least = min(accepted, 1) if keyed else accepted
    most = min(accepted + unknown, 1) if keyed else accepted + unknown
    if pieces is None and least <= whole <= most:
        return
    rows = events.rows(number)
    if not rows:
        return
    copies = [whole + pieces[row] if pieces else whole for row in rows]
    story = f"event {events.id(number).decode()}: {accepted} x 200, {unknown} x unknown, rows {_show_copies(copies)}"
    if min(copies) < least:
        verdict.lost.add(story)
    if max(copies) > most:
        (verdict.duplicated if most else verdict.foreign).add(story)
    if min(copies) != max(copies):
        verdict.torn.add(story)


def _count_pieces(verdict: Verdict, name: str, rows: list[bytes], expected: list[bytes], into: Counter[bytes]) -> None:
    known = set(expected)
    for row in rows:
        if row in known:
            into[row] += 1
        else:
            _judge_unknown_row(verdict, name, row)


def _judge_unknown_row(verdict: Verdict, name: str, row: bytes, whole_id: bool = True) -> None:
    (verdict.foreign if whole_id and _is_row(row) else verdict.torn).add(f"{name}: {_show(row)}")


def _records(stream: BinaryIO, prefix: bytes) -> Iterator[bytes]:
    """Cut a file after each line end outside quotes, and before each line that begins as our rows do.

    No cell has a line that begins so. Without the second cut, one torn row would swallow the rest.
    """
    lines: list[bytes] = []
    quotes = 0
    for line in stream:
        if lines and line.startswith(prefix):
            yield b"".join(lines)
            lines, quotes = [], 0
        lines.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            yield line if len(lines) == 1 else b"".join(lines)
            lines, quotes = [], 0
    if lines:
        yield b"".join(lines)


def _device_id(record: bytes) -> bytes:
    return record[: record.find(b";")]


def _is_row(record: bytes) -> bool:
    try:
        cells = list(csv.reader(io.StringIO(record.decode(), newline=""), delimiter=";", strict=True))
    except (UnicodeDecodeError, csv.Error):
        return False
    return len(cells) == 1 and len(cells[0]) == 7 and encode_row(cells[0]) == record


def _show(record: bytes) -> str:
    text = repr(record)[1:]
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[:_EXAMPLE_CHARACTERS] + "…"


def _show_copies(copies: list[int]) -> str:
    return " ".join(f"{count}x" for count in copies[:20]) + (" …" if len(copies) > 20 else "")
