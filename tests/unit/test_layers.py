"""The import rules: a module imports from its own component and from lower layers, and pure modules do no I/O.

A component is a module or a whole package, named by its dotted path. Components of one layer are independent.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = [
    {"common.first", "common.errors", "common.metrics", "common.logs", "common.process", "common.workers"},
    {"common.http", "common.amqp", "common.event", "common.storage"},
    {"common.config", "common.health"},
    {"common.producer", "common.consumer"},
    {"producer", "consumer"},
]
# What a component may import of another component in its layer.
EXCEPTIONS = {
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
IMPORT_ORJSON = {"common.event.document", "common.event.rows", "common.event.schema"}
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
    """Return every module of the two processes by its dotted path; a package stands for its __init__."""
    paths = [ROOT / "producer.py", ROOT / "consumer.py", *(ROOT / "common").rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


PATHS = module_paths()


def imports(name: str) -> tuple[set[str], set[str]]:
    """Return our modules, dotted, and the top-level names of all others, that a module imports anywhere in it."""
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
                assert each in PATHS, f"{name} imports {each}, which is not a module"
                ours.add(each)
            else:
                others.add(each.partition(".")[0])
    return ours - {"common"}, others  # `common` itself holds the version only


def within(name: str, component: str) -> bool:
    return name == component or name.startswith(component + ".")


def component_and_layer(name: str) -> tuple[str, int]:
    found = [
        (component, number)
        for number, components in enumerate(LAYERS)
        for component in components
        if within(name, component)
    ]
    assert len(found) == 1, f"{name} is in {len(found)} components: give it exactly one"
    return found[0]


def is_pure(name: str) -> bool:
    return any(within(name, each) for each in PURE)


MODULES = sorted(name for name in PATHS if PATHS[name].read_text().strip() and name != "common")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    component, layer = component_and_layer(name)
    for other in imports(name)[0]:
        other_component, other_layer = component_and_layer(other)
        is_exception = any(within(name, here) and within(other, there) for here, there in EXCEPTIONS)
        assert other_component == component or other_layer < layer or is_exception, f"{name} may not import {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_pure_modules_do_no_io(name: str) -> None:
    """They use no clock, socket, randomness or environment, and import no module of ours that does."""
    ours, others = imports(name)
    assert not others & IMPURE
    assert all(map(is_pure, ours)), f"{name} is pure, and imports {ours}"


@pytest.mark.parametrize("name", MODULES)
def test_run_time_needs_only_three_packages(name: str) -> None:
    assert imports(name)[1] - set(sys.stdlib_module_names) <= RUN_TIME


def test_only_events_import_orjson() -> None:
    assert {name for name in MODULES if "orjson" in imports(name)[1]} == IMPORT_ORJSON


def test_every_rule_names_what_exists() -> None:
    components = {component for layer in LAYERS for component in layer}
    for name in PURE | components | {each for pair in EXCEPTIONS for each in pair}:
        assert any(within(module, name) for module in PATHS), f"{name} does not exist"


def test_modules_form_no_cycle() -> None:
    done: set[str] = set()
    waiting = set(MODULES)
    while waiting:
        ready = {name for name in waiting if imports(name)[0] & set(MODULES) <= done}
        assert ready, f"a cycle among {waiting}"
        done |= ready
        waiting -= ready
