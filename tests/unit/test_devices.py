"""docs/devices.md has a line for each answer that a device can get, and its arithmetic is right."""

from __future__ import annotations

import re
from pathlib import Path

from common.producer.metrics import STATUSES

PAGE = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
NO_DEVICE_GETS = {204}  # the preflight of a browser


def test_every_status_of_the_producer_has_its_line() -> None:
    table = PAGE.partition("## What to do after each answer\n")[2].partition('\n\n"Retries"')[0]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:]
    listed = [int(status) for cell in cells for status in re.findall(r"\d{3}", cell)]
    assert sorted(set(STATUSES) - NO_DEVICE_GETS | {429, 502}) == sorted(listed)


def test_the_table_of_windows_is_rate_times_outage() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| (.+) \|$", PAGE.partition("events/s of one partition")[2], re.MULTILINE)[:5]
    assert len(rows) == 5
    for rate, cells in rows:
        for seconds, cell in zip((60, 600, 3600, 86_400), cells.split(" | "), strict=True):
            window = int(rate.replace(",", "")) * seconds
            if window <= 200_000:
                assert cell == "default"
            elif window <= 20_000_000:
                assert cell == f"{window:,}"
            else:
                assert cell == "more partitions"
