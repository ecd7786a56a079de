"""Recovery as a decision: from what a start finds to the plan. Pure; repair.py carries it out.

Nothing is ever destroyed. Bytes that must leave the CSV are set aside, and committed rows stay where they are.
docs/guarantees.md ("What a start finds") and tests/unit/test_recovery.py have the decision as a table.
"""

from __future__ import annotations

from typing import NamedTuple

from common.event.rows import CSV_HEADER


class FileState(NamedTuple):
    """How far a file is committed, and its identity: crc32 of its committed bytes from `chunk_offset` on."""

    device: int
    inode: int
    committed_bytes: int
    chunk_offset: int
    chunk_crc32: int
    started_at: float  # Unix time of its first row, or else of when the file was begun or taken over


class LastRun(NamedTuple):
    """The journal's record of the run before this one."""

    state: FileState
    clean: bool  # it ended cleanly, with everything written committed
    outdated: str = ""  # why the state is not its last one, by the mark; else ""


class Corrupt(NamedTuple):
    """A journal that does not say what was committed."""

    why: str


class FileFacts(NamedTuple):
    """The facts about the CSV at its path, which begins with our header as far as it goes."""

    device: int
    inode: int
    size: int  # 0 also if it was just made
    intact: bool  # whether the last committed bytes of the journal are there


class Plan(NamedTuple):
    """What to do, in this order. Without `continue_after`, the file is taken over, and its whole rows count."""

    set_journal_aside: str = ""  # why it does not count; "" if it does
    cut_renamed: FileState | None = None  # find this file under another name, and set its uncommitted end aside
    not_found: str = ""  # the note for the operator when there is none
    note: str = ""  # for the operator
    continue_after: FileState | None = None  # set aside what is after the committed bytes
    whole_until: int = 0  # of a file that is taken over; a torn row at its end is set aside


NO_JOURNAL = "without a journal the last rows can be duplicated once, and retries of older events are not recognised"
LONGER = (
    "has {} bytes that its journal does not know of, though the last run ended cleanly (the journal is an older copy, "
    "or another program wrote them): whole rows stay, and can be duplicated once"
)
MOVED_AWAY = (
    "the file of the last run is not in this folder under any name: if it was moved or compressed since the crash, "
    "its rows after the first {} bytes were not committed, and are written again"
)


def decide(journal: LastRun | Corrupt | None, file: FileFacts) -> Plan:
    if journal is None:
        return Plan(note=NO_JOURNAL if file.size else "")  # an empty file is that of a first start
    if isinstance(journal, Corrupt):
        return Plan(set_journal_aside=journal.why, note=NO_JOURNAL)
    state = journal.state
    # If the CSV has the length that an outdated journal says, both were put back together.
    if journal.outdated and file.size != state.committed_bytes:
        return Plan(set_journal_aside=journal.outdated, note=NO_JOURNAL)
    plan = Plan()
    known = file.intact and _is_known(file, journal)
    if not (journal.clean or journal.outdated) and (file.device, file.inode) != (state.device, state.inode):
        plan = Plan(cut_renamed=state, not_found="" if known else MOVED_AWAY.format(state.committed_bytes))
    more = file.size - state.committed_bytes
    # A run that ended cleanly left nothing uncommitted: the rest may be committed rows, and the journal a copy.
    if known and journal.clean and more > 0:
        return plan._replace(note=LONGER.format(more), whole_until=state.committed_bytes)
    if known:
        return plan._replace(continue_after=state)
    if not file.size:
        note = "was missing or empty, and is begun again"
    elif more < 0:
        note = f"was truncated or replaced: it has {file.size} bytes, and {state.committed_bytes} were committed"
    else:
        note = "was replaced or changed, or its journal is an older copy"
    return plan._replace(note=note)


def _is_known(file: FileFacts, journal: LastRun) -> bool:
    """Return whether an intact file is the one that the journal describes.

    Every CSV begins with the header. If no more than that was committed, rows after it are taken for those of a crash
    only in the same inode; any other file with rows was put there.
    """
    committed = journal.state.committed_bytes
    same_file_after_a_crash = file.inode == journal.state.inode and not journal.clean
    return committed > len(CSV_HEADER) or file.size == committed or same_file_after_a_crash
