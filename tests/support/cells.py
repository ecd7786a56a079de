"""Cells of the CSV, read as README.md says."""

from __future__ import annotations

import csv


def split_tags(cell: str) -> list[str]:
    """Return the tags of a row from its last cell, which is itself a CSV record."""
    return next(csv.reader([cell]), [])
