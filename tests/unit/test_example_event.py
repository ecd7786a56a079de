"""The same example of an event is everywhere: in examples/, README, `make run`, compose.yaml and on the page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from common.event.rows import csv_rows
from scripts import run
from tests.support.openapi import EVENT_EXAMPLES

ROOT = Path(__file__).parents[2]
EVENT = json.loads((ROOT / "examples" / "event.json").read_text())


def test_make_run_and_compose_show_the_example() -> None:
    [shown] = re.findall(r" -d '(\{.+\})'", run.announcement())
    assert json.loads(shown) == EVENT
    assert "-d @examples/event.json" in (ROOT / "compose.yaml").read_text()


def test_the_readme_shows_the_example_and_its_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    [shown] = re.findall(r" -d '(\{.+?\})'", readme, re.DOTALL)
    assert json.loads(shown) == EVENT
    parts, count = csv_rows(json.dumps(EVENT).encode(), 0.25)
    assert count == len(EVENT["data"]["preds"])
    for row in csv.reader("".join(parts).splitlines(), delimiter=";"):
        assert ";".join(row) in readme


def test_the_page_begins_with_the_example() -> None:
    assert EVENT_EXAMPLES["event"]["value"] == EVENT
