"""Recovery on the disk: how a plan of recovery.py is carried out. Every function can raise OSError."""

from __future__ import annotations

import errno
import os
import time

from common.event.rows import CSV_HEADER
from common.storage.csv_file import CHUNK_BYTES, CsvFile, crc32
from common.storage.files import sync_directory
from common.storage.journal import Journal
from common.storage.recovery import FileState, Plan


def apply(plan: Plan, file: CsvFile, journal: Journal, notes: list[str]) -> FileState:
    """Carry out a plan; return the committed state for the journal. Append what was done to `notes`."""
    if plan.set_journal_aside:
        notes.append(f"the journal is corrupt ({plan.set_journal_aside}) and was moved to {journal.set_aside()}")
    if plan.cut_renamed and not cut_renamed(file.path, plan.cut_renamed, notes) and plan.not_found:
        notes.append(plan.not_found)
    if plan.note:
        notes.append(plan.note)
    if plan.continue_after is None:
        return adopt(file, notes, plan.whole_until)
    committed = plan.continue_after.committed_bytes
    if more := file.size() - committed:
        aside = file.set_aside(committed)
        notes.append(f"{more} bytes that the last run had not committed were moved to {aside}")
    file.sync()
    sync_directory(file.path)
    return plan.continue_after._replace(device=file.device, inode=file.inode)


def is_intact(file: CsvFile, state: FileState) -> bool:
    """Return whether the committed bytes are still there, by the checksum of the last of them."""
    return file.size() >= state.committed_bytes and (
        crc32(file.read(state.chunk_offset, state.committed_bytes)) == state.chunk_crc32
    )


def cut_renamed(path: str, state: FileState, notes: list[str]) -> bool:
    """Find the renamed file of a run that crashed, and set its uncommitted end aside. Return whether it was found."""
    found = False
    with os.scandir(os.path.dirname(path)) as entries:
        # Not `path` itself, which is open already: a reboot may have given its disk another device number.
        names = [e.path for e in entries if e.inode() == state.inode and e.is_file() and e.path != path]
    for name in names:
        try:
            file = CsvFile(name)
        except OSError as error:
            if error.errno == errno.EBUSY:  # it is another consumer's, and has the number of a file that was removed
                continue
            raise
        try:
            if file.device == state.device and is_intact(file, state):
                found = True
                notes.append(f"the file of the last run is now {name}")
                if more := file.size() - state.committed_bytes:
                    aside = file.set_aside(state.committed_bytes, path)
                    notes.append(f"{more} bytes of it that were not committed were moved to {aside}")
                    file.sync()
        finally:
            file.close()
    return found


def adopt(file: CsvFile, notes: list[str], whole_until: int = 0) -> FileState:
    """Take over a file that the journal does not know. Its rows are known to be whole up to `whole_until`."""
    file.check_header()
    size = file.size()
    if size < len(CSV_HEADER):
        file.cut(0)
        file.write(CSV_HEADER)
        end = len(CSV_HEADER)
    elif (end := file.rows_end(whole_until)) < size:
        aside = file.set_aside(end)
        notes.append(f"{size - end} bytes of a torn row at the end were moved to {aside}")
    file.sync()
    sync_directory(file.path)
    offset = max(0, end - CHUNK_BYTES)
    return FileState(file.device, file.inode, end, offset, crc32(file.read(offset, end)), round(time.time(), 3))
