"""Rotated files: when a CSV becomes one, their names, their compression, and which of them are removed.

Those of `data.csv` are `data-<UTC time>.csv`, and `….csv.gz` once they are compressed. No other file that predlog makes
matches `data-*.csv*`. The names are in order of rotation, whatever the clock does.
"""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import threading
import uuid
from contextlib import suppress
from typing import NamedTuple

from common.storage.files import BLOCK_BYTES, explain_os_error, mode_of, open_regular, sync_directory, utc_now

DAY_SECONDS = 86_400
_tending = threading.Lock()


class Rotated(NamedTuple):
    """A rotated file, plain or compressed. They compare in order of rotation."""

    utc: str
    number: int  # of those with the same UTC time
    path: str
    compressed: bool


def period_due(first_row_at: float, now: float, interval_seconds: int) -> bool:
    """Return whether `now` is in another period than the first row of a CSV. Times are Unix times; 0 s is never.

    Periods are counted from UTC midnight, those longer than a day from the Unix epoch.
    """
    return interval_seconds > 0 and period_start(now, interval_seconds) != period_start(first_row_at, interval_seconds)


def period_start(at: float, interval_seconds: int) -> float:
    day_seconds = max(DAY_SECONDS, interval_seconds)
    day = at // day_seconds * day_seconds
    return day + (at - day) // interval_seconds * interval_seconds


def rotated_files(csv_path: str) -> list[Rotated]:
    """Return the rotated files of a CSV, oldest first. Raise OSError."""
    folder, name = os.path.split(csv_path)
    stem, suffix = map(re.escape, os.path.splitext(name))
    pattern = re.compile(rf"{stem}-(\d{{8}}T\d{{6}}Z)(?:-(\d+))?{suffix}(\.gz)?")
    found = [match for entry in os.listdir(folder) if (match := pattern.fullmatch(entry))]
    return sorted(
        Rotated(match[1], int(match[2] or 0), os.path.join(folder, match[0]), bool(match[3])) for match in found
    )


def new_name(csv_path: str) -> str:
    """Return the name for a CSV that is rotated now, after all others. Raise OSError."""
    utc, number = utc_now(), 0
    for last in rotated_files(csv_path)[-1:]:
        if last.utc >= utc:  # in the same second, or the clock was set back
            utc, number = last.utc, last.number + 1
    stem, suffix = os.path.splitext(csv_path)
    return f"{stem}-{utc}-{number}{suffix}" if number else f"{stem}-{utc}{suffix}"


def remove_oldest(csv_path: str, keep: int) -> list[str]:
    """Remove all but the latest `keep` rotated files, or none for 0; return their paths. Raise OSError."""
    files = rotated_files(csv_path)
    kept = list(dict.fromkeys(file[:2] for file in files))[-keep:]
    removed = [file.path for file in files if file[:2] not in kept]
    for path in removed:
        os.unlink(path)
    return removed


def tend(csv_path: str, keep: int, compresses: bool, log: logging.Logger) -> None:
    """Remove all but the latest `keep` rotated files (0: remove none), and compress the others if `compresses`."""
    part = f"{csv_path}.{uuid.uuid4().hex}.gz.part"  # another consumer can still be at work here
    with _tending:
        try:
            for path in remove_oldest(csv_path, keep):
                log.info("%s: removed, since only the latest %d rotated files are kept", path, keep)
            for file in rotated_files(csv_path):
                if compresses and not file.compressed:
                    compress(file.path, part)
        except OSError as error:
            with suppress(OSError):
                os.unlink(part)  # rows may need its space
            log.warning("%s; it is tried again after the next rotation or start", explain_os_error(error, csv_path))


def compress(path: str, part: str) -> None:
    """Replace the file `path` by `path`.gz, of the same mode, by way of the file `part`. Raise OSError.

    The plain file is removed only when the whole .gz is on disk under its name. After a kill it can be run again.
    """
    part_fd = open_regular(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode_of(path))
    with open(part_fd, "wb") as target, open(open_regular(path, os.O_RDONLY), "rb") as plain:
        with gzip.GzipFile(os.path.basename(path), "wb", 6, target) as zipped:
            shutil.copyfileobj(plain, zipped, BLOCK_BYTES)
        target.flush()
        os.fsync(part_fd)
    os.rename(part, f"{path}.gz")
    sync_directory(path)
    os.unlink(path)
