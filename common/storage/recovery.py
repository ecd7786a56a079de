"""What a start finds, and what it does about it. Destroys nothing: bytes that must go from the CSV are set aside."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace

from common.event.rows import CSV_HEADER
from common.storage.csv_file import CsvFile
from common.storage.files import free_name, sync_directory
from common.storage.journal import FileState, Journal, JournalCorrupt

CHUNK_BYTES = 64 << 10  # how much of the committed end is kept as a checksum to know the file again


def load(journal: Journal, notes: list[str]) -> tuple[FileState, bool] | None:
    """The state that the last run left. A journal that cannot be read is moved aside, and is as good as none."""
    try:
        return journal.load()
    except JournalCorrupt as error:
        set_journal_aside(journal, str(error), notes)
        return None


def set_journal_aside(journal: Journal, why: str, notes: list[str]) -> None:
    aside = free_name(f"{journal.path}.corrupt-")
    os.rename(journal.path, aside)
    sync_directory(aside)
    notes.append(f"the journal is corrupt ({why}) and was moved to {aside}")


def recover(file: CsvFile, existed: bool, left: tuple[FileState, bool] | None, notes: list[str]) -> FileState:
    """Brings `file` to its committed length when it is the one that the journal speaks of, and adopts it otherwise."""
    size = file.size()
    if left is None:
        if size or notes:  # something was here before, so the journal is lost, and not only yet to come
            notes.append(
                "without a journal the last rows, if their messages come again, are doubled once, "
                "and retries of older events are not recognised"
            )
        return adopt(file, notes)
    state, clean = left
    same = (file.device, file.inode) == (state.device, state.inode)
    if not (same or clean):
        cut_renamed(file.path, state, notes)
    # Every CSV of this kind begins with the header. When no more than that was committed, rows after it are taken for
    # the rest of a crash only in the very file that we wrote; otherwise somebody put a file with rows there.
    known = (
        state.committed_bytes > len(CSV_HEADER)
        or size == state.committed_bytes
        or (file.inode == state.inode and not clean)
    )
    if existed and known and is_intact(file, size, state):
        if size > state.committed_bytes:
            aside = file.set_aside(state.committed_bytes)
            who = "another program appended after a clean stop" if clean else "the last run had not committed"
            notes.append(f"{size - state.committed_bytes} bytes that {who} were moved to {aside}")
        file.sync()
        sync_directory(file.path)
        return replace(state, device=file.device, inode=file.inode)
    if not existed:
        notes.append("was missing and is started anew")
    elif size < state.committed_bytes:
        notes.append(f"was truncated or replaced: it has {size} bytes, and {state.committed_bytes} were committed")
    else:
        notes.append("was replaced or changed by another program")
    return adopt(file, notes)


def is_intact(file: CsvFile, size: int, state: FileState) -> bool:
    """Whether the committed bytes are still there, going by the last of them."""
    return size >= state.committed_bytes and (
        file.crc32(state.chunk_offset, state.committed_bytes) == state.chunk_crc32
    )


def cut_renamed(path: str, state: FileState, notes: list[str]) -> None:
    """After a crash: finds the file that we wrote under another name (logrotate) and sets its uncommitted end aside."""
    with os.scandir(os.path.dirname(path)) as entries:
        # Not our own: it is open already, and a reboot may have given its disk another device number.
        names = [e.path for e in entries if e.inode() == state.inode and e.is_file() and e.path != path]
    for name in names:
        file = CsvFile(name)
        try:
            size = file.size()
            if file.device == state.device and is_intact(file, size, state):
                notes.append(f"the file of the last run is now {name}")
                if size > state.committed_bytes:
                    aside = file.set_aside(state.committed_bytes)
                    notes.append(f"{size - state.committed_bytes} bytes that were not committed there moved to {aside}")
                    file.sync()
        finally:
            file.close()


def adopt(file: CsvFile, notes: list[str]) -> FileState:
    """Takes a file over: its whole rows count as committed, a torn end is set aside, an empty one gets a header.

    Raises OSError for a file that does not begin with our header.
    """
    size = file.size()
    head = b"".join(file.read(0, min(size, len(CSV_HEADER))))
    if head != CSV_HEADER[: len(head)]:
        header = CSV_HEADER.decode().strip()
        raise OSError(errno.EINVAL, f"does not begin with the line {header!r} and CRLF: move it away", file.path)
    if size < len(CSV_HEADER):
        file.cut(0)
        file.write(CSV_HEADER)
        end = len(CSV_HEADER)
    else:
        end = file.rows_end()
        if end < size:
            aside = file.set_aside(end)
            notes.append(f"{size - end} bytes of a torn row at the end were moved to {aside}")
    file.sync()
    sync_directory(file.path)
    offset = max(0, end - CHUNK_BYTES)
    return FileState(file.device, file.inode, end, offset, file.crc32(offset, end), round(time.time(), 3))
