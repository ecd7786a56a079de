"""What README and docs/ say is what the code does: settings, links."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from common import config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
BOTH = {item.name for item in fields(config.Settings)}


def rows(kind: type[config.Settings], left_out: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """The table of settings as the code has them, in its order."""
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
    """Each setting with its default and its help, in the code's order; none that does not exist."""
    section = SETTINGS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert rows_in(section) == expected


def test_the_readmes_settings_are_rows_of_the_settings_page() -> None:
    shown = rows_in(README.partition("\n## Settings\n")[2].partition("\n## ")[0])
    assert shown
    assert set(shown) <= set(rows_in(SETTINGS))


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
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
