"""Whatever strings an event holds, its rows are read back as they were: by Python's csv, by pandas and by DuckDB."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import duckdb
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import InvalidEvent
from common.event.document import write_json
from common.event.rows import CSV_HEADER, _join_tags, count_rows, csv_rows
from common.event.schema import Event, normalise_event, read_event
from tests.support.cells import split_tags

THRESHOLD = 0.25
NAMES = CSV_HEADER.decode().strip().split(";")

# Mostly characters with a meaning in the dialect, and values that readers try to guess.
NASTY = st.text(st.sampled_from(list(";,\"\r\n\0'\t \\#|é\u2028\ufeff😀a1")), max_size=6)
WORDS = st.sampled_from(
    ["", "NA", "nan", "NULL", "null", "None", "1", "01", "1.0", "true", '""', "low_prob", "-", "\\N"]
)
TEXT = NASTY | WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.floats(0, 1)


def events(text: st.SearchStrategy[str]) -> st.SearchStrategy[Event]:
    pred = st.fixed_dictionaries({"image_frame": text, "prob": FINITE, "tags": st.lists(text, max_size=4)})
    data = st.fixed_dictionaries({"license_id": text, "preds": st.lists(pred, max_size=4)})
    return st.fixed_dictionaries({"device_id": text, "client_id": text, "created_at": text, "data": data})


def encode_rows(batch: list[Event], threshold: float) -> bytes:
    """The rows of a batch, as the consumer makes them of the messages' bodies."""
    made = [csv_rows(write_json(one), threshold) for one in batch]
    assert [count for _, count in made] == [len(one["data"]["preds"]) for one in batch]
    return "".join(part for parts, _ in made for part in parts).encode()


Row = tuple[str, str, str, str, str, float, list[str]]


def expected_rows(batch: list[Event]) -> list[Row]:
    return [
        (
            *(one["device_id"], one["client_id"], one["created_at"], one["data"]["license_id"], pred["image_frame"]),
            pred["prob"],
            pred["tags"] + ["low_prob"] * (pred["prob"] < THRESHOLD),
        )
        for one in batch
        for pred in one["data"]["preds"]
    ]


def typed(cells: list[list[str]]) -> list[Row]:
    return [(*ids, frame, float(prob), split_tags(tags)) for *ids, frame, prob, tags in cells]  # type: ignore[misc]


def file_of(batch: list[Event]) -> bytes:
    return CSV_HEADER + encode_rows(batch, THRESHOLD)


def same(left: list[Row], right: list[Row]) -> bool:
    return repr(left) == repr(right)  # tells -0.0 from 0.0


thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@thorough
@given(batch=st.lists(events(TEXT), max_size=3))
def test_pythons_csv_reads_back_every_event(batch: list[Event]) -> None:
    rows = list(csv.reader(io.StringIO(file_of(batch).decode(), newline=""), delimiter=";"))
    assert rows[0] == NAMES
    assert same(typed(rows[1:]), expected_rows(batch))


@thorough
@given(batch=st.lists(events(TEXT), max_size=3))
def test_the_bytes_are_what_csv_writer_writes(batch: list[Event]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=";")
    for row in expected_rows(batch):
        cell = io.StringIO(newline="")
        csv.writer(cell).writerow(row[-1])
        writer.writerow((*row[:-1], cell.getvalue()[:-2]))
    assert encode_rows(batch, THRESHOLD) == file.getvalue().encode()


PLAIN_TAG = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=',"\r\n'), min_size=1, max_size=6)


@thorough
@given(
    batch=st.lists(events(TEXT), max_size=3),
    tags=st.lists(st.lists(PLAIN_TAG, max_size=4), min_size=12, max_size=12),
)
def test_with_plain_tags_the_bytes_are_what_the_original_wrote(batch: list[Event], tags: list[list[str]]) -> None:
    """The original: csv.writer(file, delimiter=";") and ",".join(tags)."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=";")
    for pred, plain in zip((pred for one in batch for pred in one["data"]["preds"]), tags, strict=False):
        pred["tags"] = plain
    for row in expected_rows(batch):
        writer.writerow((*row[:-1], ",".join(row[-1])))
    assert encode_rows(batch, THRESHOLD) == file.getvalue().encode()


@thorough
@given(batch=st.lists(events(TEXT), max_size=3))
def test_pandas_reads_back_every_event(batch: list[Event]) -> None:
    """The options dtype and keep_default_na make cells text, not values to guess."""
    frame = pandas.read_csv(io.BytesIO(file_of(batch)), sep=";", dtype=str, keep_default_na=False)
    assert list(frame.columns) == NAMES
    assert same(typed(frame.values.tolist()), expected_rows(batch))


def read_with_duckdb(path: Path) -> list[list[Any]]:
    """The dialect is stated, not guessed. An empty cell comes as NULL, and stands for the empty string."""
    relation = duckdb.execute(
        """SELECT COLUMNS(*) FROM read_csv(?, delim=';', quote='"', escape='"', header=true, auto_detect=false,
               columns={'device_id':'VARCHAR','client_id':'VARCHAR','created_at':'VARCHAR','license_id':'VARCHAR',
                        'image_frame':'VARCHAR','prob':'VARCHAR','tags':'VARCHAR'})""",
        [str(path)],
    )
    return [["" if cell is None else cell for cell in row] for row in relation.fetchall()]


@thorough
@given(batch=st.lists(events(TEXT), max_size=3))
def test_duckdb_reads_back_every_event(batch: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(file_of(batch))
    assert same(typed(read_with_duckdb(path)), expected_rows(batch))


@settings(max_examples=100, deadline=None)
@given(tags=st.lists(TEXT, max_size=5))
def test_a_list_of_tags_is_read_back_from_its_cell(tags: list[str]) -> None:
    assert split_tags(_join_tags(tags)) == tags


@thorough
@given(one=events(TEXT.map(lambda text: text.replace("\0", ""))))
def test_normal_form_survives_the_queue(one: Event) -> None:
    normal = normalise_event(write_json(one), max_preds=10).body
    decoded = read_event(normal)
    assert decoded == one
    assert same(expected_rows([decoded]), expected_rows([one]))
    assert write_json(decoded) == normal == normalise_event(normal, max_preds=10).body
    assert count_rows(normal) == len(one["data"]["preds"])


@thorough
@given(batch=st.lists(events(st.text(st.sampled_from('ab\u00e9;",\n'), max_size=3)), min_size=1, max_size=1))
def test_what_another_publisher_laid_out_gives_the_same_rows(batch: list[Event]) -> None:
    """It has integers for ids and prob, unknown members, another order. The slow path finds what the quick one does."""
    [one] = batch
    loose = json.dumps({"more": 1, **dict(reversed(list(one.items()))), "device_id": 7}, indent=1).encode()
    expected = encode_rows([{**one, "device_id": "7"}], THRESHOLD)
    for body in (loose, loose.replace(b'"device_id": 7', b'"device_id": "7"')):
        assert "".join(csv_rows(body, THRESHOLD)[0]).encode() == expected


@pytest.mark.parametrize(
    "fault",
    [
        {"prob": None}, {"prob": True}, {"prob": "x"}, {"tags": None}, {"tags": "ab"}, {"tags": [1]}, {"tags": [None]},
        {"image_frame": 1}, {"image_frame": None},
    ],
)  # fmt: skip
def test_no_row_is_made_of_what_is_not_an_event(fault: dict[str, object]) -> None:
    pred = {"image_frame": "f", "prob": 0.5, "tags": ["a"]}
    data = {"license_id": "l", "preds": [pred, pred | fault]}
    body = write_json({"device_id": "d", "client_id": "c", "created_at": "t", "data": data})
    with pytest.raises(InvalidEvent):
        csv_rows(body, THRESHOLD)


def test_readers_get_the_same_table_with_their_own_types() -> None:
    """prob is a number. The only option is the delimiter."""
    batch = [
        {
            "device_id": "d",
            "client_id": "c",
            "created_at": "2023-02-07 14:56:49.386042",
            "data": {
                "license_id": "l",
                "preds": [{"image_frame": f"f{n}", "prob": n / 7, "tags": ["cat", "a,b"]} for n in range(8)],
            },
        }
    ]
    frame = pandas.read_csv(io.BytesIO(file_of(batch)), sep=";")
    assert frame["prob"].tolist() == [n / 7 for n in range(8)]
    assert [split_tags(cell) for cell in frame["tags"]][-1] == ["cat", "a,b"]


def test_a_cell_beyond_pythons_field_limit_is_one_cell() -> None:
    """csv.reader stops at 128 KiB by default; a frame in base64 can be longer."""
    size = 200_000
    batch = [
        {
            "device_id": "d",
            "client_id": "c",
            "created_at": "t",
            "data": {"license_id": "l", "preds": [{"image_frame": "A" * size, "prob": 1.0, "tags": ['"' * size]}]},
        }
    ]
    before = csv.field_size_limit(1 << 30)
    try:
        rows = typed(list(csv.reader(io.StringIO(file_of(batch).decode(), newline=""), delimiter=";"))[1:])
    finally:
        csv.field_size_limit(before)
    assert same(rows, expected_rows(batch))
