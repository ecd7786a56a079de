"""The import rules: a module imports from its own room and from lower floors, and pure modules do no I/O.

A room is a module or a whole package, named by its dotted path. Rooms of one floor do not know each other.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = [
    {"common.first", "common.errors", "common.metrics", "common.logs", "common.process", "common.workers"},
    {"common.http", "common.amqp", "common.event", "common.storage"},
    {"common.config", "common.health"},
    {"common.producer", "common.consumer"},
    {"producer", "consumer"},
]
# What a room may import of another room on its floor.
DOORS = {
    ("common.process", "common.errors"),
    ("common.process", "common.logs"),
    ("common.workers", "common.errors"),
    ("common.storage", "common.event.rows"),  # the header
}
PURE = {
    "common.errors",
    "common.metrics",
    "common.config",
    "common.event",
    "common.http.parser",
    "common.http.phases",
    "common.http.pool",
    "common.http.turns",
    "common.http.fields",
    "common.http.coding",
    "common.http.tokens",
    "common.storage.recovery",
    "common.amqp.address",
    "common.amqp.window",
    "common.amqp.codec",
    "common.amqp.properties",
    "common.producer.openapi",
    "common.producer.broker_health",
    "common.producer.origins",
    "common.producer.routes",
    "common.consumer.pending",
    "common.consumer.prepare",
}
KNOWS_ORJSON = {"common.event.document", "common.event.rows", "common.event.schema"}
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


def module_paths() -> dict[str, Path]:
    """Every module of the two processes by its dotted path; a package stands for its __init__."""
    paths = [ROOT / "producer.py", ROOT / "consumer.py", *(ROOT / "common").rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


PATHS = module_paths()


def imports(name: str) -> tuple[set[str], set[str]]:
    """The modules of ours, dotted, and the top-level names of all others, that a module imports anywhere in it."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(PATHS[name].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import, which this test does not read"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in PATHS else str(node.module) for each in dotted]
        else:
            continue
        for each in found:
            if each.partition(".")[0] in ("common", "producer", "consumer"):
                assert each in PATHS, f"{name} imports {each}, which is no module"
                ours.add(each)
            else:
                others.add(each.partition(".")[0])
    return ours - {"common"}, others  # `common` itself holds the version only


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_and_floor(name: str) -> tuple[str, int]:
    found = [(room, number) for number, rooms in enumerate(FLOORS) for room in rooms if within(name, room)]
    assert len(found) == 1, f"{name} is in {len(found)} rooms: give it exactly one"
    return found[0]


def is_pure(name: str) -> bool:
    return any(within(name, each) for each in PURE)


MODULES = sorted(name for name in PATHS if PATHS[name].read_text().strip() and name != "common")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    room, floor = room_and_floor(name)
    for other in imports(name)[0]:
        other_room, other_floor = room_and_floor(other)
        door = any(within(name, here) and within(other, there) for here, there in DOORS)
        assert other_room == room or other_floor < floor or door, f"{name} may not import {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_pure_modules_do_no_io(name: str) -> None:
    """They take no clock, socket, randomness or environment, and import no module of ours that does."""
    ours, others = imports(name)
    assert not others & IMPURE
    assert all(map(is_pure, ours)), f"{name} is pure, and imports {ours}"


@pytest.mark.parametrize("name", MODULES)
def test_run_time_needs_only_three_packages(name: str) -> None:
    assert imports(name)[1] - set(sys.stdlib_module_names) <= RUN_TIME


def test_only_events_know_orjson() -> None:
    assert {name for name in MODULES if "orjson" in imports(name)[1]} == KNOWS_ORJSON


def test_every_rule_names_what_exists() -> None:
    rooms = {room for floor in FLOORS for room in floor}
    for name in PURE | rooms | {each for door in DOORS for each in door}:
        assert any(within(module, name) for module in PATHS), f"{name} does not exist"


def test_modules_form_no_circle() -> None:
    done: set[str] = set()
    waiting = set(MODULES)
    while waiting:
        ready = {name for name in waiting if imports(name)[0] & set(MODULES) <= done}
        assert ready, f"a circle among {waiting}"
        done |= ready
        waiting -= ready
