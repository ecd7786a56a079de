"""What README and docs/ say is what the code does: settings, links."""

from __future__ import annotations

import ast
import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from common import config
from common.errors import InvalidEvent
from common.event.schema import normalise_event

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
BOTH = {item.name for item in fields(config.Settings)}


def rows(kind: type[config.Settings], left_out: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """Return the table of settings as the code has them, in its order."""
    found = []
    for item in fields(kind):
        default = config.DEFAULT_AMQP_URL if item.name == "amqp_url" else item.default
        shown = int(default) if isinstance(default, bool) else default
        text = item.metadata["help"].partition(" (default amqp")[0]
        cell = f"`{shown}`" if shown != "" else "none"
        if item.name not in left_out:
            found.append(f"| `{item.name.upper()}` | {cell} | {text} |")
    return found


def rows_in(markdown: str) -> list[str]:
    return re.findall(r"^\| `[A-Z_]+` \| .*$", markdown, re.MULTILINE)


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("Both processes", rows(config.Settings)),
        ("Producer", rows(config.ProducerSettings, BOTH)),
        ("Consumer", rows(config.ConsumerSettings, BOTH)),
    ],
)
def test_the_settings_page_is_what_the_code_says(heading: str, expected: list[str]) -> None:
    """The page has each setting with its default and its help, in the code's order, and no other."""
    section = SETTINGS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert rows_in(section) == expected


def test_the_readmes_settings_are_rows_of_the_settings_page() -> None:
    shown = rows_in(README.partition("\n## Settings\n")[2].partition("\n## ")[0])
    assert shown
    assert set(shown) <= set(rows_in(SETTINGS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_code_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"\b((?:common|deploy|scripts|tests)/[\w./-]*\w)", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def defined_in(path: Path) -> set[str]:
    """Return functions, classes, and methods as `Class.method`."""
    defined = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            defined |= {f"{node.name}.{method.name}" for method in methods}
    return defined


@pytest.mark.parametrize("program", ["producer.py", "consumer.py"])
def test_the_walk_of_a_program_names_what_its_files_define(program: str) -> None:
    walk = ast.get_docstring(ast.parse((ROOT / program).read_text()), clean=False)
    steps = re.findall(r"^    (\w[\w., ]+?) +(common/[\w/]+\.py) ", walk or "", re.MULTILINE)
    assert len(steps) >= 6
    for names, path in steps:
        assert set(names.split(", ")) <= defined_in(ROOT / path), path


def test_every_method_that_the_walk_of_an_event_names_exists() -> None:
    """`Class.method` in docs/architecture.md is a method in common/."""
    walk = (ROOT / "docs" / "architecture.md").read_text()
    methods = set().union(*map(defined_in, (ROOT / "common").rglob("*.py")))
    named = set(re.findall(r"`([A-Z]\w+\.[a-z]\w+)`", walk))
    assert named
    assert named <= methods | {"aiormq.TransportFactory"}


def test_what_pydantic_1_coerced_is_answered_as_documented() -> None:
    """Each row of the table in docs/http.md is tried."""
    event = {
        "device_id": "a",
        "client_id": "b",
        "created_at": "c",
        "data": {"license_id": "d", "preds": [{"image_frame": "e", "prob": 0.5, "tags": []}]},
    }
    table = (ROOT / "docs" / "http.md").read_text().partition("written for pydantic 1\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| `.+?` \| (?:422 `(\w+)`|200, as `(.+?)`) \|$", table, re.MULTILINE)
    assert len(rows) == 6
    for member, fault, normalised in rows:
        [(name, value)] = json.loads(f"{{{member}}}").items()
        changed = copy.deepcopy(event)
        place: dict[str, Any] = changed if name in changed else changed["data"]["preds"][0]  # type: ignore[index]
        place[name] = value
        body = json.dumps(changed).encode()
        if fault:
            with pytest.raises(InvalidEvent) as refused:
                normalise_event(body, 100)
            assert [each["type"] for each in refused.value.faults] == [fault], member
        else:
            assert json.loads(normalise_event(body, 100).body)[name] == json.loads(normalised)


def anchors(page: Path) -> set[str]:
    """Return the fragments that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, fragment = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []
