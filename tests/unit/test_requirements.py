"""What is installed is what is declared: imports, pyproject.toml and the pinned files agree."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DECLARED = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
GROUPS = {
    name: [Requirement(text) for text in texts if isinstance(text, str)]
    for name, texts in PROJECT["dependency-groups"].items()
}
FILES = ["requirements.txt", "requirements-dev.txt", "requirements-e2e.txt", "requirements-bench.txt"]


def pins(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package in a pinned file."""
    found = {}
    for entry in re.split(r"\n(?=[a-z])", (ROOT / name).read_text()):
        if match := re.match(r"([a-z0-9-]+)==(\S+)", entry):
            found[match[1]] = (match[2], re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))
    return found


def modules_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_every_package_that_the_processes_import_is_declared() -> None:
    sources = [ROOT / "producer.py", ROOT / "consumer.py", *(ROOT / "common").rglob("*.py")]
    imported = set().union(*map(modules_imported, sources)) - sys.stdlib_module_names - {"common"}
    assert imported == {requirement.name for requirement in DECLARED}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("requirements.txt", DECLARED),
        ("requirements-dev.txt", DECLARED + GROUPS["dev"] + GROUPS["e2e"]),
        ("requirements-e2e.txt", GROUPS["e2e"]),
        ("requirements-bench.txt", GROUPS["bench"]),
    ],
)
def test_what_is_declared_is_pinned_in_range(name: str, wanted: list[Requirement]) -> None:
    """`make lock` was run after the last change of pyproject.toml."""
    pinned = pins(name)
    assert [str(wish) for wish in wanted if wish.name not in pinned or pinned[wish.name][0] not in wish.specifier] == []


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_hashes(name: str) -> None:
    assert [package for package, (_, hashes) in pins(name).items() if not hashes] == []


def test_the_pinned_files_agree_on_each_version() -> None:
    development = pins("requirements-dev.txt")
    for name in FILES:
        pinned = pins(name)
        assert {package: development[package] for package in pinned if package in development}.items() <= pinned.items()
        assert pinned.keys() <= development.keys() or name == "requirements-bench.txt"  # the one that may be left out
