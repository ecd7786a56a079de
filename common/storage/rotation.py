"""Rotated files: when a CSV becomes one, their names, and which of them are removed.

Those of `data.csv` are `data-<UTC time>.csv`, and `….csv.gz` once they are compressed. No other file that predlog makes
matches `data-*.csv*`. The names are in order of rotation, whatever the clock does.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import NamedTuple

from common.storage.files import utc_now

DAY_SECONDS = 86_400


class Rotated(NamedTuple):
    """A rotated file, plain or compressed. They compare in order of rotation."""

    utc: str
    number: int  # of those with the same UTC time
    path: str
    compressed: bool


def period_due(first_row_at: float, now: float, interval_seconds: int) -> bool:
    """Tell whether `now` belongs to a later period than the first row of a CSV. Times are Unix times.

    Periods are counted from UTC midnight, those longer than a day from the Unix epoch. When the clock was set back by
    more than an interval, the first row belongs to a period that is far in the future, and a new file is due as well.
    """
    first, current = period_start(first_row_at, interval_seconds), period_start(now, interval_seconds)
    return not first - interval_seconds <= current <= first


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
    """Return the name for a CSV that is rotated now, behind all others. Raise OSError."""
    utc, number = utc_now(), 0
    for last in rotated_files(csv_path)[-1:]:
        if last.utc >= utc:  # in the same second, or the clock was set back
            utc, number = last.utc, last.number + 1
    stem, suffix = os.path.splitext(csv_path)
    return f"{stem}-{utc}-{number}{suffix}" if number else f"{stem}-{utc}{suffix}"


def remove_oldest(csv_path: str, keep: int) -> list[str]:
    """Remove all but the latest `keep` rotated files; return their paths. Raise OSError."""
    files = rotated_files(csv_path)
    kept = list(dict.fromkeys(file[:2] for file in files))[-keep:]
    removed = [file.path for file in files if file[:2] not in kept]
    for path in removed:
        with suppress(FileNotFoundError):
            os.unlink(path)
    return removed
