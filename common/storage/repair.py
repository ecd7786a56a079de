"""Recovery on the disk: the facts that recovery.py decides by, and the steps that it returns.

Every function raises OSError.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from common.event.rows import CSV_HEADER
from common.storage.csv_file import CsvFile, crc32
from common.storage.files import sync_directory
from common.storage.journal import Journal
from common.storage.records import JournalCorrupt
from common.storage.recovery import (
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
    adoption,
)
from common.storage.state import CHUNK_BYTES, FileState, LastRun


def load(journal: Journal) -> LastRun | Corrupt | None:
    """Read what the last run left in the journal."""
    try:
        return journal.load()
    except JournalCorrupt as error:
        return Corrupt(str(error))


def look(file: CsvFile, existed: bool, journal: LastRun | Corrupt | None) -> FileFacts:
    size = file.size()
    intact = isinstance(journal, LastRun) and is_intact(file, size, journal.state)
    return FileFacts(existed, file.device, file.inode, size, read_head(file, size), intact)


def apply(steps: Sequence[Step], file: CsvFile, journal: Journal, notes: list[str]) -> FileState:
    """Carry out the steps; return the committed state for the journal. Append what was done to `notes`."""
    for step in steps:
        match step:
            case Note(text):
                notes.append(text)
            case SetJournalAside(why):
                notes.append(f"the journal is corrupt ({why}) and was moved to {journal.set_aside()}")
            case CutRenamed(state, otherwise):
                if not cut_renamed(file.path, state, notes) and otherwise:
                    notes.append(otherwise)
            case Continue(state):
                return continue_after(file, state, notes)
            case _:
                return take_over(step, file, notes)
    raise AssertionError("a recovery without an end")


def is_intact(file: CsvFile, size: int, state: FileState) -> bool:
    """Tell whether the committed bytes are still there, by the checksum of the last of them."""
    return size >= state.committed_bytes and (
        crc32(file.read(state.chunk_offset, state.committed_bytes)) == state.chunk_crc32
    )


def read_head(file: CsvFile, size: int) -> bytes:
    return b"".join(file.read(0, min(size, len(CSV_HEADER))))


def continue_after(file: CsvFile, state: FileState, notes: list[str]) -> FileState:
    """Set aside what is behind the committed bytes."""
    more = file.size() - state.committed_bytes
    if more > 0:
        aside = file.set_aside(state.committed_bytes)
        notes.append(f"{more} bytes that the last run had not committed were moved to {aside}")
    file.sync()
    sync_directory(file.path)
    return state._replace(device=file.device, inode=file.inode)


def cut_renamed(path: str, state: FileState, notes: list[str]) -> bool:
    """Find the renamed file of a run that crashed, and set its uncommitted end aside. Tell whether it was found."""
    found = False
    with os.scandir(os.path.dirname(path)) as entries:
        # Not `path` itself, which is open already: a reboot may have given its disk another device number.
        names = [e.path for e in entries if e.inode() == state.inode and e.is_file() and e.path != path]
    for name in names:
        file = CsvFile(name)
        try:
            size = file.size()
            if file.device == state.device and is_intact(file, size, state):
                found = True
                notes.append(f"the file of the last run is now {name}")
                if size > state.committed_bytes:
                    aside = file.set_aside(state.committed_bytes, path)
                    notes.append(f"{size - state.committed_bytes} bytes that were not committed there moved to {aside}")
                    file.sync()
        finally:
            file.close()
    return found


def adopt(file: CsvFile, notes: list[str]) -> FileState:
    """Take over a file that the journal does not know. Raise OSError for one that does not begin with our header."""
    size = file.size()
    return take_over(adoption(read_head(file, size), size), file, notes)


def take_over(how: Adopt | Begin | Refuse, file: CsvFile, notes: list[str]) -> FileState:
    if isinstance(how, Refuse):
        raise OSError(errno.EINVAL, how.why, file.path)
    if isinstance(how, Begin):
        file.cut(0)
        file.write(CSV_HEADER)
        end = len(CSV_HEADER)
    else:
        size, end = file.size(), file.rows_end(how.start)
        if end < size:
            aside = file.set_aside(end)
            notes.append(f"{size - end} bytes of a torn row at the end were moved to {aside}")
    file.sync()
    sync_directory(file.path)
    offset = max(0, end - CHUNK_BYTES)
    return FileState(file.device, file.inode, end, offset, crc32(file.read(offset, end)), round(time.time(), 3))
