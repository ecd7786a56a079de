"""What a start finds, and what it does: the table of docs/guarantees.md, line by line, without a disk."""

from __future__ import annotations

from itertools import product

import pytest

from common.event.rows import CSV_HEADER
from common.storage.recovery import (
    LONGER,
    MOVED_AWAY,
    NO_JOURNAL,
    Corrupt,
    FileFacts,
    FileState,
    LastRun,
    Plan,
    decide,
)

EMPTY = len(CSV_HEADER)
COMMITTED = 1000
STATE = FileState(device=1, inode=2, committed_bytes=COMMITTED, chunk_offset=0, chunk_crc32=7, started_at=1.5)
ONLY_HEADER = FileState(device=1, inode=2, committed_bytes=EMPTY, chunk_offset=0, chunk_crc32=7, started_at=1.5)
CRASHED, CLEAN = LastRun(STATE, False), LastRun(STATE, True)
NO_ROWS_CRASHED, NO_ROWS_CLEAN = LastRun(ONLY_HEADER, False), LastRun(ONLY_HEADER, True)
GONE = "its end is gone"
OUTDATED = LastRun(STATE, False, GONE), LastRun(STATE, True, GONE)

MISSING = "was missing or empty, and is begun again"
REPLACED = "was replaced or changed, or its journal is an older copy"


def shorter(size: int) -> str:
    return f"was truncated or replaced: it has {size} bytes, and {COMMITTED} were committed"


def csv(size: int = COMMITTED, *, intact: bool = True, inode: int = 2, device: int = 1) -> FileFacts:
    return FileFacts(device, inode, size, intact)


NEW = csv(0, intact=False, inode=3)

CONTINUE = Plan(continue_after=STATE)
LOOK = Plan(cut_renamed=STATE, not_found=MOVED_AWAY.format(COMMITTED))
LOOK_TOO = Plan(cut_renamed=ONLY_HEADER, not_found=MOVED_AWAY.format(EMPTY))
WEAKER = Plan(note=NO_JOURNAL)


def weaker(why: str) -> Plan:
    return Plan(set_journal_aside=why, note=NO_JOURNAL)


TABLE: list[tuple[str, LastRun | Corrupt | None, FileFacts, Plan]] = [
    ("nothing at all: the first start", None, NEW, Plan()),
    ("a CSV and no journal", None, csv(intact=False), WEAKER),
    ("our file as it was committed, after a clean stop", CLEAN, csv(), CONTINUE),
    ("our file as it was committed, after a crash", CRASHED, csv(), CONTINUE),
    ("bytes after the committed ones, after a crash", CRASHED, csv(1200), CONTINUE),
    ("more bytes, after a clean stop", CLEAN, csv(1200), Plan(note=LONGER.format(200), whole_until=COMMITTED)),
    ("no CSV, after a clean stop", CLEAN, NEW, Plan(note=MISSING)),
    ("no CSV, after a crash", CRASHED, NEW, LOOK._replace(note=MISSING)),
    ("a shorter CSV", CLEAN, csv(500, intact=False), Plan(note=shorter(500))),
    ("a CSV cut within its header", CRASHED, csv(10, intact=False), Plan(note=shorter(10))),
    ("another CSV, after a clean stop", CLEAN, csv(1200, intact=False, inode=3), Plan(note=REPLACED)),
    ("another CSV, after a crash", CRASHED, csv(1200, intact=False, inode=3), LOOK._replace(note=REPLACED)),
    ("a CSV edited in place", CRASHED, csv(intact=False), Plan(note=REPLACED)),
    ("a copy of our file", CRASHED, csv(1004, inode=3), CONTINUE._replace(cut_renamed=STATE)),
    ("our file on a renumbered disk", CRASHED, csv(1200, device=9), CONTINUE._replace(cut_renamed=STATE)),
    ("rows in our file, none committed", NO_ROWS_CRASHED, csv(500), Plan(continue_after=ONLY_HEADER)),
    ("a CSV with rows over ours, which had none", NO_ROWS_CLEAN, csv(500), Plan(note=REPLACED)),
    ("a CSV for ours without rows", NO_ROWS_CRASHED, csv(500, inode=3), LOOK_TOO._replace(note=REPLACED)),
    ("a CSV put back with an outdated journal", OUTDATED[0], csv(inode=3), CONTINUE),  # another file may have more
    ("a corrupt journal", Corrupt("a bad line"), csv(intact=False), weaker("a bad line")),
    ("a corrupt journal and no CSV", Corrupt("empty"), NEW, weaker("empty")),
    ("a journal whose end is gone", OUTDATED[0], csv(1200), weaker(GONE)),
    ("an older CSV and journal, put back together", OUTDATED[1], csv(), CONTINUE),
]


@pytest.mark.parametrize(("journal", "file", "plan"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_a_start_finds(journal: LastRun | Corrupt | None, file: FileFacts, plan: Plan) -> None:
    assert decide(journal, file) == plan


def test_after_a_crash_no_uncommitted_row_is_forgotten() -> None:
    """For every combination of facts, the rest of the file is cut or looked for."""
    sizes = (0, 10, EMPTY, COMMITTED - 1, COMMITTED, COMMITTED + 200)
    for size, intact, inode in product(sizes, (True, False), (2, 3)):
        if intact and size < COMMITTED:
            continue  # cannot be
        plan = decide(CRASHED, csv(size, intact=intact, inode=inode))
        assert inode == STATE.inode or plan.cut_renamed == STATE
        assert plan.continue_after == (STATE if intact else None)
