"""The recipes of docs/reading.md, run as they are on a CSV with every cell that a reader can get wrong."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.event.rows import CSV_HEADER, csv_rows
from tests.support.cells import split_tags

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reading.md").read_text()
HEADER = ["device_id", "client_id", "created_at", "license_id", "image_frame", "prob", "tags"]
HOSTILE = [
    *("NA", "null", "nan", "", "007", "1e5", "true", "2026-01-01", "=1+1", " blanks ", "\t", "#", "'", "\\n", "\\N"),
    *('"', '""', 'l"2', 'l""2', '"l""2"', "a;b", "new\nline", "cr\rx", "crlf\r\ny", "a\n\\.\nb", "\\.", "\u2028"),
    *("猫", "🐈", "\ufeff", "x" * 1_000_000, 'l"2;\r\n' * 200_000),
]
PROBS = (-1.5, 0.0, 1e300, 5e-324, 1e-7, 2.0**70)

Row = list[object]


def blocks(heading: str, language: str) -> list[str]:
    """The blocks of code below a heading, up to the next."""
    section = re.split(r"^#+ ", PAGE.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def block(heading: str, language: str = "python") -> str:
    [code] = blocks(heading, language)
    return code


@pytest.fixture(scope="module")
def hostile() -> list[Row]:
    """Rows whose first quoted cell is after row 20,479, which is as far as DuckDB looks to guess the dialect."""
    rows: list[Row] = [
        [f"camera-{n % 7}", "007", "2026-11-29T10:00:00Z", "NA", f"f-{n}", n / 3e4, "a,b"] for n in range(22_000)
    ]
    plain = rows[7]
    for cell in HOSTILE:
        for column in (0, 3, 4, 6) if len(cell) < 100 else (4,):
            rows.append([*plain[:column], cell, *plain[column + 1 :]])
    rows += [[*plain[:5], prob, ""] for prob in PROBS]
    return rows


@pytest.fixture
def folder(tmp_path: Path, hostile: list[Row], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with rows.csv."""
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([HEADER, *hostile])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected)
    assert [n for n, (row, wanted) in enumerate(zip(found, expected, strict=True)) if row != wanted] == []


@pytest.mark.parametrize("heading", ["pandas", "polars", "DuckDB", "Python's csv"])
def test_a_python_recipe_reads_hostile_cells_exactly(folder: Path, hostile: list[Row], heading: str) -> None:
    pytest.importorskip(heading.lower().removeprefix("python's "))
    limit = csv.field_size_limit()
    names: dict[str, Any] = {}
    try:
        exec(block(heading), names)
        found = names["rows"]
        if hasattr(found, "itertuples"):  # pandas
            assert list(found.columns) == HEADER
            found = found.itertuples(index=False)
        elif hasattr(found, "iter_rows"):  # polars
            assert found.columns == HEADER
            found = found.iter_rows()
        elif hasattr(found, "fetchall"):  # DuckDB
            assert found.columns == HEADER
            found = found.fetchall()
        else:
            found = [row.values() for row in found]
        assert_same([list(row) for row in found], hostile)
    finally:
        csv.field_size_limit(limit)


def test_pandas_polars_and_duckdb_read_compressed_files(folder: Path) -> None:
    """The lines are the same with another name."""
    with gzip.open(folder / "rows.csv.gz", "wb", compresslevel=1) as file:
        file.write((folder / "rows.csv").read_bytes())
    for heading in ("pandas", "polars", "DuckDB"):
        if heading == "polars":
            pytest.importorskip("polars")
        names: dict[str, Any] = {}
        exec(block(heading).replace("rows.csv", "rows.csv.gz"), names)
        assert len(names["rows"]) == 22_000 + 4 * (len(HOSTILE) - 2) + 2 + len(PROBS)


def test_the_duckdb_recipe_needs_little_memory_for_a_short_file(folder: Path) -> None:
    (folder / "rows.csv").write_bytes(CSV_HEADER + b"a;b;c;d;e;0.5;\r\n")
    names: dict[str, Any] = {}
    exec("import duckdb; duckdb.sql(\"SET memory_limit='200MB'\")\n" + block("DuckDB"), names)
    assert names["rows"].fetchall() == [("a", "b", "c", "d", "e", 0.5, "")]
    names["duckdb"].sql("RESET memory_limit")


def test_parquet_holds_the_same_rows(folder: Path, hostile: list[Row]) -> None:
    names: dict[str, Any] = {}
    exec(block("DuckDB") + block("Parquet"), names)
    read = names["duckdb"].sql("SELECT * FROM 'rows.parquet'")
    assert read.types == ["VARCHAR"] * 5 + ["DOUBLE", "VARCHAR"]
    assert_same([list(row) for row in read.fetchall()], hostile)


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the sqlite3 shell is not installed")
def test_the_sqlite_shell_imports_hostile_cells_exactly(folder: Path, hostile: list[Row]) -> None:
    subprocess.run(["sqlite3", "rows.db"], input=block("SQLite", "sql"), text=True, check=True)
    database = sqlite3.connect("rows.db")
    found = [list(row) for row in database.execute("SELECT * FROM predictions ORDER BY rowid")]
    database.close()
    assert_same(found, hostile)


def postgres_programs() -> Path | None:
    found = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    return Path(found).resolve().parent if found else None


@pytest.fixture
def postgres_folder() -> Iterator[Path]:
    """A folder that the server's user can read. Other users cannot read pytest's."""
    with tempfile.TemporaryDirectory(prefix="predlog-pg-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def psql(postgres_folder: Path) -> Iterator[list[str]]:
    """The command of psql, as superuser of a private server."""
    programs = postgres_programs()
    if programs is None or shutil.which("psql") is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # as root it does not start
    base = postgres_folder / "server"
    base.mkdir()
    if user:
        shutil.chown(base, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(base / "data"), *arguments]
        with (postgres_folder / "said").open("wb") as said:
            # The server keeps what it inherits, so its output is no pipe that we would read to its end.
            subprocess.run(command, cwd=base, user=user, stdout=said, stderr=said, check=True)

    run("initdb", "-A", "trust", "-U", "postgres")
    run("pg_ctl", "-w", "-o", f"-c listen_addresses= -c fsync=off -k {base}", "-l", str(base / "log"), "start")
    try:
        yield ["psql", "-h", str(base), "-U", "postgres", "-q", "-v", "ON_ERROR_STOP=1"]
    finally:
        run("pg_ctl", "-m", "immediate", "stop")


def test_postgresql_copies_hostile_cells_exactly(
    folder: Path, hostile: list[Row], postgres_folder: Path, psql: list[str]
) -> None:
    rows = shutil.copy(folder / "rows.csv", postgres_folder)
    sql = block("PostgreSQL", "sql").replace("/path/rows.csv", str(rows))
    subprocess.run(psql, input=sql, text=True, check=True)
    with (folder / "out.csv").open("wb") as file:
        subprocess.run([*psql, "--csv", "-c", "SELECT * FROM predictions"], stdout=file, check=True)
    limit = csv.field_size_limit(2**31 - 1)
    with (folder / "out.csv").open(newline="", encoding="utf-8") as text:
        found: list[Row] = [[*row[:5], float(row[5]), row[6]] for row in list(csv.reader(text))[1:]]
    csv.field_size_limit(limit)
    assert_same(found, hostile)


def test_the_recipe_for_tags_reads_them_as_they_were_sent() -> None:
    names: dict[str, Any] = {}
    exec(block("Columns"), names)
    for tags in ([], [""], ["", ""], ["a,b"], ['"'], ["cat", "animal"], ["new\nline", "crlf\r\n"], [" x "], ["猫"]):
        cell = tags_cell(tags)
        assert names["split_tags"](cell) == split_tags(cell) == tags


def tags_cell(tags: list[str]) -> str:
    """The cell that the consumer writes for these tags."""
    pred = {"image_frame": "e", "prob": 1.0, "tags": tags}
    event = {"device_id": "a", "client_id": "b", "created_at": "c", "data": {"license_id": "d", "preds": [pred]}}
    parts, _ = csv_rows(json.dumps(event).encode(), 0.25)
    [row] = csv.reader(["".join(parts)], delimiter=";")
    return row[-1]


OTHERS = [
    *("data.csv", "data.csv.journal", "data.csv.lock", "data.csv.dead-letters", "data.csv.committed"),
    *("data.csv.uncommitted-20261129T000000Z", "data.csv.journal.corrupt-20261129T000000Z"),
    *("data-20261129T000000Z.csv.uncommitted-20261129T000001Z", "data-20261129T000000Z.csv.gz.part", "data.0.csv"),
]


def test_the_patterns_find_rotated_files_and_nothing_else(tmp_path: Path) -> None:
    rotated = [f"{stem}-2026112{day}T000000Z.csv" for stem in ("data", "data.0", "data.12") for day in range(3)]
    rotated += [f"{name}.gz" for name in rotated]
    for name in (*OTHERS, *rotated):
        (tmp_path / name).touch()
    patterns = re.findall(r"^\| `(data[^`]*)` \|", PAGE, re.MULTILINE)
    assert len(patterns) == 2
    assert sorted(path.name for pattern in patterns for path in tmp_path.glob(pattern)) == sorted(rotated)


def test_rotated_files_come_in_order_and_each_once(tmp_path: Path) -> None:
    """There are many of the same second, and one whose compression is not over."""
    order = ["data-20261128T235959Z.csv.gz", "data-20261129T000000Z.csv.gz"]
    order += [f"data-20261129T000000Z-{number}.csv" for number in range(1, 12)]
    for name in (*OTHERS, *order, "data-20261129T000000Z.csv", "data.0-20261129T000000Z.csv"):
        (tmp_path / name).touch()
    names: dict[str, Any] = {}
    exec(block("Rotated files"), names)
    found = [path.name for path in names["rotated_files"](str(tmp_path))]
    assert found == order
    assert [path.name for path in names["rotated_files"](str(tmp_path), "data.0")] == ["data.0-20261129T000000Z.csv"]


def test_reading_on_gives_every_byte_once_across_rotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    live = data / "data.csv"
    names: dict[str, Any] = {}
    exec(block("Rotated files") + block("Only what is new"), names)
    names["READ"] = [sys.executable, "-c", "import sys; sys.stdout.buffer.write(open('data/data.csv', 'rb').read())"]
    last, offset = "", 0
    written = read = b""
    for step in range(12):
        if step % 4 == 3:  # two rotations, of which one is compressed, between two looks
            for number in range(2):
                rotated = data / f"data-20261129T0000{step:02}Z{'-1' * number}.csv"
                live.rename(rotated)
                if number == 0:
                    Path(f"{rotated}.gz").write_bytes(gzip.compress(rotated.read_bytes()))
                    if step == 7:
                        rotated.unlink()
                live.write_bytes(CSV_HEADER + b"%d;rotated %d\r\n" % (step, number))
                written += live.read_bytes()
        else:
            new = (CSV_HEADER if not live.exists() else b"") + b"%d;row\r\n" % step
            with live.open("ab") as file:
                file.write(new)
            written += new
        if step % 3 != 1:
            new, last, offset = names["read_on"](last, offset)
            read += new
    assert read == written
