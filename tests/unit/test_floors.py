"""The structure: a module imports only from floors below its own, and only what its floor may use."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = [
    {"errors", "event", "config", "http1", "content", "frames", "batch", "metrics", "openapi", "letters"},  # pure
    {"http_server", "fast_lane", "publisher", "csv_file", "journal", "lifecycle", "workers"},  # I/O
    {"amqp", "store", "api"},
    {"dead_letters"},
    {"dead_letter_commands"},
    {"producer", "consumer"},
]
IMPURE = {
    "asyncio",
    "os",
    "socket",
    "time",
    "ssl",
    "signal",
    "threading",
    "subprocess",
    "random",
    "uvloop",
    "aiormq",
    "pathlib",
}
RUN_TIME = {"aiormq", "pamqp", "yarl", "uvloop", "orjson"}  # pamqp and yarl are aiormq's own


def files() -> dict[str, Path]:
    common = {path.stem: path for path in (ROOT / "common").glob("*.py") if path.stem != "__init__"}
    return common | {name: ROOT / f"{name}.py" for name in ("producer", "consumer")}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The modules of ours, and the other top-level packages, that a file imports."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "common":
            names = [f"common.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "common":
                if rest in files():
                    ours.add(rest.split(".")[0])
            elif top in ("producer", "consumer"):
                ours.add(top)
            else:
                others.add(top)
    return ours, others


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("name", sorted(files()))
def test_imports_point_down(name: str) -> None:
    ours, _ = imports(files()[name])
    if floor(name) == 0:
        up = {other for other in ours if floor(other) > 0}
        assert not up, f"{name} is pure, but imports {up}"
    else:
        sideways = {other for other in ours if floor(other) >= floor(name)}
        assert not sideways, f"{name} imports {sideways} of its own floor or above"


@pytest.mark.parametrize("name", sorted(FLOORS[0]))
def test_pure_modules_take_no_clock_socket_or_environment(name: str) -> None:
    _, others = imports(files()[name])
    assert not others & IMPURE


@pytest.mark.parametrize("name", sorted(files()))
def test_only_the_three_packages_are_needed_at_run_time(name: str) -> None:
    _, others = imports(files()[name])
    assert others - set(sys.stdlib_module_names) <= RUN_TIME


def test_only_the_event_module_knows_orjson() -> None:
    assert [name for name, path in files().items() if "orjson" in imports(path)[1]] == ["event"]


def test_every_module_has_a_floor_and_the_floors_have_no_circle() -> None:
    assert {name for names in FLOORS for name in names} == set(files())
    done: set[str] = set()
    waiting = set(files())
    while waiting:
        ready = {name for name in waiting if imports(files()[name])[0] <= done}
        assert ready, f"a circle among {waiting}"
        done |= ready
        waiting -= ready
