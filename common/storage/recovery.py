"""Recovery as a decision: from what a start finds to the steps to take. Pure; repair.py looks, and carries them out.

Nothing is ever destroyed. Bytes that must leave the CSV are set aside, and committed rows stay where they are.
docs/guarantees.md ("What a start finds") and tests/unit/test_recovery.py have it as a table.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from common.event.rows import CSV_HEADER
from common.storage.state import FileState, LastRun

# What is found.


class Corrupt(NamedTuple):
    """A journal that does not say what was committed."""

    why: str


class FileFacts(NamedTuple):
    """The facts about the CSV at its path."""

    existed: bool  # False if it was just made, and is empty
    device: int
    inode: int
    size: int
    head: bytes  # its first bytes, as many as the header has
    intact: bool  # whether the last committed bytes of the journal are there


# What to do, in this order.


class SetJournalAside(NamedTuple):
    why: str


class CutRenamed(NamedTuple):
    """Find the file of the last run under another name, and set its uncommitted end aside."""

    state: FileState
    otherwise: str  # a note for the operator when it is not found


class Continue(NamedTuple):
    """Continue after the committed bytes, and set aside what the last run wrote behind them."""

    state: FileState


class Adopt(NamedTuple):
    """Take the file over. Its whole rows count as committed; a torn row at its end is set aside."""

    start: int = 0  # up to here they are known to be whole


class Begin(NamedTuple):
    """Write the header into a file that is empty, or has a part of the header."""


class Refuse(NamedTuple):
    """Touch nothing, since the file is not predlog's."""

    why: str


class Note(NamedTuple):
    """Tell the operator."""

    text: str


Step: TypeAlias = SetJournalAside | CutRenamed | Continue | Adopt | Begin | Refuse | Note


NO_JOURNAL = (
    "without a journal the last rows are doubled once if their messages are delivered again, "
    "and retries of older events are not recognised"
)
LONGER = (
    "has {} bytes that its journal does not know of, though the last run ended in order (the journal is an older copy, "
    "or another program wrote them): whole rows stay, and are doubled once if their messages are delivered again"
)
MOVED_AWAY = (
    "the file of the last run is not in this folder under any name: if it was moved or compressed since the crash, "
    "its rows after the first {} bytes were not committed, and are written again"
)


def decide(journal: LastRun | Corrupt | None, file: FileFacts) -> list[Step]:
    """Return the steps of a recovery. The last one is Continue, Adopt or Begin; a Refuse is the only one."""
    steps: list[Step] = []
    if isinstance(journal, Corrupt):
        steps.append(SetJournalAside(journal.why))
        journal = None
    # If the CSV has the length that an outdated journal says, both were put back together.
    elif journal is not None and journal.outdated and file.size != journal.state.committed_bytes:
        steps.append(SetJournalAside(journal.outdated))
        journal = None
    if journal is None:
        if file.size or steps:  # not the first start, so the journal is lost
            steps.append(Note(NO_JOURNAL))
        return _adopt(file, steps)
    state = journal.state
    known = file.existed and file.intact and _is_known(file, journal)
    if not journal.clean and (file.device, file.inode) != (state.device, state.inode):
        steps.append(CutRenamed(state, "" if known else MOVED_AWAY.format(state.committed_bytes)))
    if known:
        # A run that ended in order left nothing uncommitted: the rest may be committed rows, and the journal a copy.
        if journal.clean and file.size > state.committed_bytes:
            return [*steps, Note(LONGER.format(file.size - state.committed_bytes)), Adopt(state.committed_bytes)]
        return [*steps, Continue(state)]
    if not file.existed:
        note = "was missing and is started anew"
    elif file.size < state.committed_bytes:
        note = f"was truncated or replaced: it has {file.size} bytes, and {state.committed_bytes} were committed"
    else:
        note = "was replaced or changed, or its journal is an older copy"
    return _adopt(file, [*steps, Note(note)])


def _is_known(file: FileFacts, journal: LastRun) -> bool:
    """Tell whether an intact file is the one that the journal describes.

    Every CSV begins with the header. If no more than that was committed, rows behind it are taken for those of a crash
    only in the same inode; any other file with rows was put there.
    """
    committed = journal.state.committed_bytes
    if committed > len(CSV_HEADER) or file.size == committed:
        return True
    return file.inode == journal.state.inode and not journal.clean


def _adopt(file: FileFacts, steps: list[Step]) -> list[Step]:
    last = adoption(file.head, file.size)
    return [last] if isinstance(last, Refuse) else [*steps, last]


def adoption(head: bytes, size: int) -> Adopt | Begin | Refuse:
    """Return how to take over a file that the journal does not know, of `size` bytes that begin with `head`."""
    if head != CSV_HEADER[: len(head)]:
        header = CSV_HEADER.decode().strip()
        return Refuse(f"does not begin with the line {header!r} and CRLF: move it away")
    return Adopt() if size >= len(CSV_HEADER) else Begin()
