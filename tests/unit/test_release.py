"""The version is the same in every place, and a release that would contradict itself is refused."""

import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from common import __version__
from scripts.release import PLACES, ROOT, section, wrong_changelog, wrong_places

TODAY = date(2026, 11, 29)
CHANGELOG = """## [2.1.0] - 2026-11-29

- New.

### Fixed

- A.

## [2.0.0] - 2026-11-01

- Old.
"""


def test_every_place_names_the_same_version() -> None:
    assert wrong_places(ROOT, __version__) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_place_with_another_version_is_one_line(tmp_path: Path, place: str) -> None:
    for name in PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / place).read_text()
    (tmp_path / place).write_text(text.replace(__version__, "0.9.0", 1))
    assert wrong_places(tmp_path, __version__) == [f"{place} has version 0.9.0 instead of {__version__}"]
    (tmp_path / place).write_text("")
    assert wrong_places(tmp_path, __version__) == [f"{place} has version (none) instead of {__version__}"]


@pytest.mark.parametrize(
    ("changelog", "wrong"),
    [
        (CHANGELOG, []),
        (CHANGELOG.replace("29", "28"), []),
        (CHANGELOG.replace("29", "30"), ["CHANGELOG.md dates 2.1.0 2026-11-30 instead of a day up to 2026-11-29"]),
        (CHANGELOG.replace(" - 2026-11-29", ""), ["CHANGELOG.md dates 2.1.0 None instead of a day up to 2026-11-29"]),
        ("## [Unreleased]\n\n" + CHANGELOG, []),
        ("## [Unreleased]\n\n- More.\n\n" + CHANGELOG, ["CHANGELOG.md begins with [Unreleased] instead of [2.1.0]"]),
        ("", ["CHANGELOG.md begins with [None] instead of [2.1.0]"]),
    ],
)
def test_the_changelog_begins_with_the_version_and_a_day(changelog: str, wrong: list[str]) -> None:
    assert wrong_changelog(changelog, "2.1.0", TODAY) == wrong


def test_the_notes_of_a_release_are_its_section() -> None:
    assert section(CHANGELOG, "2.1.0") == "- New.\n\n### Fixed\n\n- A.\n"
    assert section(CHANGELOG, "2.0.0") == "- Old.\n"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_every_action_is_pinned_by_hash(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    used = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert used
    assert [each for each in used if len(each.partition("@")[2]) != 40] == []
