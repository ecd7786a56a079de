"""docs/reference.md lists every metric, every log line that asks for something, and every exit code, and no others.

`python -m tests.unit.test_reference` prints the tables of metrics as the code has them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import errors
from common.consumer import metrics as consumer_metrics
from common.consumer.partitions import Board
from common.producer import metrics as producer_metrics

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "common").rglob("*.py")), ROOT / "producer.py", ROOT / "consumer.py"]
LEVELS = {"warning", "error", "critical", "exception"}


def page() -> str:
    return (ROOT / "docs" / "reference.md").read_text()


def section(heading: str) -> str:
    return page().partition(f"# {heading}\n")[2].partition("\n#")[0]


def table(text: bytes) -> list[str]:
    """Return the rows for an exposition: name, type, labels and help, in the order of the code."""
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text.decode(), re.MULTILINE))
    rows = []
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text.decode(), re.MULTILINE):
        labels = re.findall(rf"^{name}\{{(.+?)\}} ", text.decode(), re.MULTILINE)
        names = dict.fromkeys(re.findall(r'(\w+)="', " ".join(labels))) if labels else {}
        cell = ", ".join(f"`{label}`" for label in names)
        rows.append(f"| `{name}` | {kind} | {cell} | {helps[name]} |")
    return rows


def tables() -> dict[str, list[str]]:
    consumer = table(consumer_metrics.Counters().metrics.render())
    return {
        "Of the producer": table(producer_metrics.Counters(partitions=2).metrics.render()),
        "Of the consumer": consumer,
        "Of the consumer, for each partition": [row for row in table(Board([0, 1]).metrics()) if row not in consumer],
    }


@pytest.mark.parametrize("heading", ["Of the producer", "Of the consumer", "Of the consumer, for each partition"])
def test_every_metric_has_its_row(heading: str) -> None:
    found = re.findall(r"^\| `(?:predlog|process)_.*$", section(heading), re.MULTILINE)
    assert found == tables()[heading]


def logged() -> Iterator[str]:
    """Yield the texts of all log calls at warning and above, with their placeholders."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
                for argument in node.args[:1]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield argument.value


def fragments() -> list[str]:
    rows = re.findall(r"^\| (`.+?`) \| ", section("Log lines"), re.MULTILINE)
    return [fragment for cell in rows for fragment in re.findall(r"`(.+?)`", cell)]


def test_every_log_line_that_asks_for_something_has_its_row() -> None:
    """A text without words (`%s: %s`) carries the error, which is another row."""
    missing = [text for text in logged() if re.sub(r"%\.?\d*[sdfr]|\W", "", text)]
    missing = [text for text in missing if not any(fragment in text for fragment in fragments())]
    assert missing == []


def test_every_row_is_a_line_that_the_code_has() -> None:
    texts = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    assert fragments()
    assert [each for each in fragments() if not any(each in text for text in texts)] == []


def test_the_exit_codes_are_those_of_the_code() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Fatal)]
    assert codes == {kind.exit_code for kind in kinds} | {0, 130}


if __name__ == "__main__":
    for heading, rows in tables().items():
        print(f"### {heading}\n\n| metric | type | labels | meaning |\n|---|---|---|---|", *rows, "", sep="\n")
