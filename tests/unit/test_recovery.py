"""What a start finds, and what it does: the table of docs/guarantees.md, line by line, without a disk."""

from __future__ import annotations

from itertools import product

import pytest

from common.event.rows import CSV_HEADER
from common.storage.recovery import (
    LONGER,
    MOVED_AWAY,
    NO_JOURNAL,
    Adopt,
    Begin,
    Continue,
    Corrupt,
    CutRenamed,
    FileFacts,
    Note,
    Refuse,
    SetJournalAside,
    Step,
    decide,
)
from common.storage.state import FileState, LastRun

EMPTY = len(CSV_HEADER)
COMMITTED = 1000
STATE = FileState(device=1, inode=2, committed_bytes=COMMITTED, chunk_offset=0, chunk_crc32=7, started_at=1.5)
ONLY_HEADER = FileState(device=1, inode=2, committed_bytes=EMPTY, chunk_offset=0, chunk_crc32=7, started_at=1.5)
CRASHED, CLEAN = LastRun(STATE, False), LastRun(STATE, True)
NO_ROWS_CRASHED, NO_ROWS_CLEAN = LastRun(ONLY_HEADER, False), LastRun(ONLY_HEADER, True)
GONE = "its end is gone"
OUTDATED = LastRun(STATE, False, GONE), LastRun(STATE, True, GONE)

WEAKER = Note(NO_JOURNAL)
MISSING = Note("was missing and is started anew")
REPLACED = Note("was replaced or changed, or its journal is an older copy")


def shorter(size: int) -> Note:
    return Note(f"was truncated or replaced: it has {size} bytes, and {COMMITTED} were committed")


def csv(
    size: int = COMMITTED, *, intact: bool = True, inode: int = 2, device: int = 1, existed: bool = True
) -> FileFacts:
    """Our file: it has `size` bytes, and begins with our header as far as it goes."""
    return FileFacts(existed, device, inode, size, CSV_HEADER[:size], intact)


MADE_NOW = csv(0, intact=False, inode=3, existed=False)
NOT_OURS = FileFacts(True, 1, 3, 5000, b"a;b;c\r\n".ljust(EMPTY, b"x"), False)

LOOK = CutRenamed(STATE, MOVED_AWAY.format(COMMITTED))
LOOK_TOO = CutRenamed(ONLY_HEADER, MOVED_AWAY.format(EMPTY))

TABLE: list[tuple[str, LastRun | Corrupt | None, FileFacts, list[Step]]] = [
    ("nothing at all: the first start", None, MADE_NOW, [Begin()]),
    ("an empty file and no journal", None, csv(0, intact=False), [Begin()]),
    ("a CSV and no journal", None, csv(intact=False), [WEAKER, Adopt()]),
    ("our file as it was committed, after a clean stop", CLEAN, csv(), [Continue(STATE)]),
    ("our file as it was committed, after a crash", CRASHED, csv(), [Continue(STATE)]),
    ("bytes behind the committed ones, after a crash", CRASHED, csv(1200), [Continue(STATE)]),
    ("more bytes, after a clean stop", CLEAN, csv(1200), [Note(LONGER.format(200)), Adopt(COMMITTED)]),
    ("no CSV, after a clean stop", CLEAN, MADE_NOW, [MISSING, Begin()]),
    ("no CSV, after a crash", CRASHED, MADE_NOW, [LOOK, MISSING, Begin()]),
    ("a shorter CSV", CLEAN, csv(500, intact=False), [shorter(500), Adopt()]),
    ("a CSV cut within its header", CRASHED, csv(10, intact=False), [shorter(10), Begin()]),
    ("another CSV, after a clean stop", CLEAN, csv(1200, intact=False, inode=3), [REPLACED, Adopt()]),
    ("another CSV, after a crash", CRASHED, csv(1200, intact=False, inode=3), [LOOK, REPLACED, Adopt()]),
    ("a CSV edited in place", CRASHED, csv(intact=False), [REPLACED, Adopt()]),
    ("a copy of our file", CRASHED, csv(1004, inode=3), [CutRenamed(STATE, ""), Continue(STATE)]),
    ("our file on a renumbered disk", CRASHED, csv(1200, device=9), [CutRenamed(STATE, ""), Continue(STATE)]),
    ("rows in our file, none committed", NO_ROWS_CRASHED, csv(500), [Continue(ONLY_HEADER)]),
    ("a CSV with rows over ours, which had none", NO_ROWS_CLEAN, csv(500), [REPLACED, Adopt()]),
    ("a CSV for ours without rows", NO_ROWS_CRASHED, csv(500, inode=3), [LOOK_TOO, REPLACED, Adopt()]),
    ("a corrupt journal", Corrupt("a bad line"), csv(intact=False), [SetJournalAside("a bad line"), WEAKER, Adopt()]),
    ("a corrupt journal and no CSV", Corrupt("empty"), MADE_NOW, [SetJournalAside("empty"), WEAKER, Begin()]),
    ("a journal whose end is gone", OUTDATED[0], csv(1200), [SetJournalAside(GONE), WEAKER, Adopt()]),
    ("an older CSV and journal, put back together", OUTDATED[1], csv(), [Continue(STATE)]),
]  # fmt: skip


@pytest.mark.parametrize(("journal", "file", "steps"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_a_start_finds(journal: LastRun | Corrupt | None, file: FileFacts, steps: list[Step]) -> None:
    assert decide(journal, file) == steps


@pytest.mark.parametrize("journal", [None, Corrupt("x"), CLEAN, CRASHED, *OUTDATED])
def test_a_file_that_is_not_ours_is_refused_and_no_more(journal: LastRun | Corrupt | None) -> None:
    (step,) = decide(journal, NOT_OURS)
    assert isinstance(step, Refuse)
    assert "does not begin with the line 'device_id;" in step.why


def test_every_recovery_ends_and_forgets_no_uncommitted_row() -> None:
    """For every combination of facts: one last step, and after a crash the rest of it is cut or looked for."""
    journals = [None, Corrupt("x"), CLEAN, CRASHED, *OUTDATED]
    sizes = (0, 10, EMPTY, COMMITTED - 1, COMMITTED, COMMITTED + 200)
    for journal, size, intact, inode, existed in product(journals, sizes, (True, False), (2, 3), (True, False)):
        if (intact and size < COMMITTED) or (size and not existed):
            continue  # cannot be
        steps = decide(journal, csv(size, intact=intact, inode=inode, existed=existed))
        assert [isinstance(step, Continue | Adopt | Begin) for step in steps] == [False] * (len(steps) - 1) + [True]
        if journal == CRASHED:
            ours = inode == STATE.inode
            assert ours or any(isinstance(step, CutRenamed) for step in steps)
            assert steps[-1] == Continue(STATE) or not intact
