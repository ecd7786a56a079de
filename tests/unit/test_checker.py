"""The checker of the load tool and of the chaos run: it finds each fault, and none in a good file."""

import csv
import io
from collections.abc import Callable

import pytest

from scripts.load.checker import Verdict, check
from scripts.load.events import HEADER, VARIANTS, Events, Frames
from scripts.load.ledger import CUT, Ledger

EVENTS = Events(seed=7, keyless_every=4, large_every=150)
COUNT = 400
ROWS = [row for number in range(COUNT) for row in EVENTS.rows(number)]
WITH_ROWS = [n for n in range(COUNT) if len(EVENTS.rows(n)) >= 3]
KEYED = next(n for n in WITH_ROWS if n > 20 and EVENTS.key(n))
KEYLESS = next(n for n in WITH_ROWS if n > 20 and not EVENTS.key(n))


def judge(rows: list[bytes], ledger: Ledger | None = None, header: bytes = HEADER) -> Verdict:
    return check(EVENTS, ledger or answered(200), [("data.csv", io.BytesIO(header + b"".join(rows)))])


def answered(*statuses: int, but: dict[int, tuple[int, ...]] | None = None) -> Ledger:
    ledger = Ledger()
    for number in range(COUNT):
        ledger.open()
        for status in (but or {}).get(number, statuses):
            ledger.record(number, status)
    return ledger


def all_rows() -> list[bytes]:
    return list(ROWS)


def counts(verdict: Verdict) -> dict[str, int]:
    return {name: finding.count for name, finding in verdict.findings.items() if finding.count}


def test_a_good_file_has_no_finding() -> None:
    verdict = judge(all_rows())
    assert verdict.holds
    assert verdict.rows == len(all_rows()) > COUNT
    assert str(verdict) == "lost 0, duplicated 0, torn 0, foreign 0"


def test_rows_may_be_spread_over_rotated_files() -> None:
    rows = all_rows()
    files = [("b", rows[:1000]), ("a", rows[1000:1001]), ("c", rows[1001:])]
    streams = [(name, io.BytesIO(HEADER + b"".join(part))) for name, part in files] + [("new", io.BytesIO())]
    assert check(EVENTS, answered(200), streams).holds


def test_an_event_that_was_answered_200_and_has_no_row_is_lost() -> None:
    missing = set(EVENTS.rows(KEYED))
    assert counts(judge([row for row in all_rows() if row not in missing])) == {"lost": 1}


def test_an_event_with_a_part_of_its_rows_is_torn_and_lost() -> None:
    missing = EVENTS.rows(KEYED)[1]
    verdict = judge([row for row in all_rows() if row != missing])
    assert counts(verdict) == {"lost": 1, "torn": 1}
    assert EVENTS.id(KEYED).decode() in verdict.torn.examples[0]


def test_a_part_of_an_event_of_unknown_outcome_is_torn() -> None:
    missing = EVENTS.rows(KEYED)[-1]
    assert counts(judge([row for row in all_rows() if row != missing], answered(504))) == {"torn": 1}


@pytest.mark.parametrize("distance", [0, 500], ids=["at once", "later"])
def test_an_event_that_is_there_twice_is_duplicated(distance: int) -> None:
    rows = all_rows()
    at = rows.index(EVENTS.rows(KEYED)[0]) + distance
    at = next(i for i in range(at, len(rows)) if rows[i].startswith(EVENTS.id(KEYED)) or distance)
    assert counts(judge([*rows[:at], *EVENTS.rows(KEYED), *rows[at:]])) == {"duplicated": 1}


def test_one_row_that_is_there_twice_is_duplicated_and_torn() -> None:
    assert counts(judge([*all_rows(), EVENTS.rows(KEYED)[0]])) == {"duplicated": 1, "torn": 1}


CUTS: dict[str, Callable[[bytes], int]] = {
    "in the prefix of its id": lambda row: 1,
    "in its id": lambda row: 5,
    "in a quoted cell": lambda row: row.index(b';"') + 3,
    "after a quoted cell": lambda row: row.index(b";", row.index(b'"', row.index(b';"') + 2)),
    "before the line end": lambda row: len(row) - 2,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_cut_row_is_torn_and_takes_no_other_one_with_it(cut: Callable[[bytes], int]) -> None:
    rows = all_rows()
    at = next(at for at, row in enumerate(rows) if b';"' in row and row.count(b"\r\n") == 1 and row.count(b'"') > 1)
    rows[at] = rows[at][: cut(rows[at])]
    found = counts(judge(rows))
    assert found["torn"] >= 1
    assert found["lost"] <= 2, "the event itself, and the one whose first row it ran into"


def test_a_file_that_ends_within_a_row_is_torn() -> None:
    rows = [*all_rows(), EVENTS.rows(KEYED)[0][:-1]]
    assert counts(judge(rows)) == {"torn": 1}


def test_a_row_that_nobody_sent_is_foreign() -> None:
    nobody = EVENTS.rows(KEYED)[0].replace(EVENTS.id(KEYED), EVENTS.id(COUNT))
    assert counts(judge([*all_rows(), b"dev;1;now;L;frame;0.5;cat\r\n", nobody])) == {"foreign": 2}


def test_a_changed_cell_is_a_foreign_row_and_a_lost_event() -> None:
    rows = all_rows()
    at = rows.index(EVENTS.rows(KEYED)[0])
    rows[at] = rows[at].replace(b"0/", b"1/", 1)
    assert counts(judge(rows)) == {"foreign": 1, "lost": 1, "torn": 1}


def test_a_row_in_another_dialect_is_a_finding() -> None:
    rows = all_rows()
    rows[-1] = rows[-1].replace(b"\r\n", b"\n")
    assert not judge(rows).holds


def test_a_second_header_is_foreign_and_a_missing_one_torn() -> None:
    assert counts(judge([*all_rows(), HEADER])) == {"foreign": 1}
    assert counts(judge(all_rows(), header=b"device_id;client_id\r\n")) == {"torn": 1}


@pytest.mark.parametrize("statuses", [(503,), (422,), (503, 503, 413)])
def test_rows_of_an_event_that_was_refused_are_foreign(statuses: tuple[int, ...]) -> None:
    assert counts(judge(all_rows(), answered(200, but={KEYED: statuses}))) == {"foreign": 1}


@pytest.mark.parametrize(
    ("number", "statuses", "copies_allowed"),
    [
        (KEYED, (504,), {0, 1}),
        (KEYED, (CUT, 504, 503), {0, 1}),
        (KEYED, (504, 200, 200), {1}),
        (KEYED, (503, 200), {1}),
        (KEYLESS, (504,), {0, 1}),
        (KEYLESS, (504, CUT), {0, 1, 2}),
        (KEYLESS, (504, 200), {1, 2}),
        (KEYLESS, (200, 200), {2}),
        (KEYLESS, (503, 200), {1}),
    ],
)
def test_copies_allowed_follow_from_the_answers_and_the_key(
    number: int, statuses: tuple[int, ...], copies_allowed: set[int]
) -> None:
    own = set(EVENTS.rows(number))
    others = [row for row in all_rows() if row not in own]
    ledger = answered(200, but={number: statuses})
    assert {n for n in range(5) if judge(others + EVENTS.rows(number) * n, ledger).holds} == copies_allowed


def test_events_depend_on_seed_and_number_only() -> None:
    again = Events(seed=7, keyless_every=4, large_every=150)
    assert [again.body(n) for n in range(COUNT)] == [EVENTS.body(n) for n in range(COUNT)]
    assert len(set(all_rows())) == len(all_rows())
    others = Events(seed=70)
    assert not set(all_rows()) & {row for n in range(COUNT) for row in others.rows(n)}
    assert EVENTS.number(others.id(3)) is None
    assert EVENTS.number(EVENTS.id(12345)) == 12345


def test_every_variant_is_written_differently() -> None:
    assert len({EVENTS.body(KEYED, variant) for variant in range(VARIANTS)}) == VARIANTS


def test_frames_set_the_size_of_an_event() -> None:
    assert Frames.parse("5x20KB") == Frames(5, 20 << 10)
    assert 100 << 10 < len(Events(1, Frames.parse("5x20KB")).body(3)) < 103 << 10
    with pytest.raises(ValueError, match="5x20KB"):
        Frames.parse("20KB")


def test_a_file_of_rows_is_read_back_by_the_csv_module() -> None:
    def read(rows: list[bytes]) -> list[list[str]]:
        return list(csv.reader(io.StringIO(b"".join(rows).decode(), newline=""), delimiter=";", strict=True))

    assert [row[0] for row in read(all_rows())] == [row.partition(b";")[0].decode() for row in all_rows()]
