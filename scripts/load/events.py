"""Seeded events that identify themselves, and the rows that the contract makes of each. Pure.

No code under test is imported: the expected rows come from the standard csv module alone. The events hold every awkward
choice: quotes, separators, line ends, other scripts, numbers as strings.
An event is a function of (seed, frames, number): a ledger of millions of events keeps numbers, not bodies.
"""

import base64
import csv
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEADER = b"device_id;client_id;created_at;license_id;image_frame;prob;tags\r\n"
LOW_PROB_THRESHOLD = 0.25
VARIANTS = 4
"""Ways to write the same event as JSON; see `Events.body`."""
BATCH_EVENTS = 8

_PLACE = "@EVENT-ID@"  # replaced in the encoded bytes, where neither JSON nor CSV ever quotes it or an id
_SHAPES_MAX = 256
_SHAPES_BYTES = 8 << 20
_AWKWARD = (
    "plain", "semi;colon", 'quo"te', '"', "new\nline", "cr\r\nlf", "\r", "", " blanks ", "a,b", "tab\t", "back\\slash",
    "Kölner Straße", "摄像头", "🎥🎬", "e\u0301", "\u2028\u2029", "=1+1", "'", ";;\"\"\n", "null", "0",
)  # fmt: skip
_TAGS = ("cat", "animal", "a,b", 'quo"te', "semi;colon", "猫", "two words", "low_prob", "🐈")


@dataclass(frozen=True, slots=True)
class Frames:
    """Predictions of an event and the size of each one's image_frame."""

    count: int
    size_bytes: int

    @classmethod
    def parse(cls, text: str) -> "Frames":
        """Parse `5x20KB` or `3x512`. Raise ValueError."""
        match = re.fullmatch(r"(\d+)x(\d+)(B|KB|MB)?", text, re.IGNORECASE)
        if match is None:
            raise ValueError(f"frames: {text!r} is not COUNTxSIZE, as in 5x20KB")
        unit = {"B": 1, "KB": 1 << 10, "MB": 1 << 20}[(match[3] or "B").upper()]
        return cls(int(match[1]), int(match[2]) * unit)


_LARGE = Frames(2, 100 << 10)


@dataclass(frozen=True, slots=True)
class _Shape:
    document: dict[str, Any]
    body: bytes
    rows: tuple[bytes, ...]


class Events:
    """The events of one seed, by number from 0. A seed names its events: use it once per CSV."""

    def __init__(
        self,
        seed: int,
        frames: Frames | None = None,
        *,
        keyless_every: int = 0,
        large_every: int = 0,
        batch_every: int = 0,
    ) -> None:
        """Prepare the events of `seed`. Without `frames`, each has 0 to 10 small predictions.

        Every `keyless_every`-th event has no Idempotency-Key, every `large_every`-th is larger than an AMQP frame. Of
        the groups of BATCH_EVENTS in a row, every `batch_every`-th is a batch, with one key for all.
        """
        self.prefix = b"load-%d-" % seed
        self._keyless_every = keyless_every
        self._batch_every = batch_every
        count = _SHAPES_MAX
        if frames is not None:
            count = max(4, min(count, _SHAPES_BYTES // (3 * frames.count * frames.size_bytes + 1)))
        chooser = random.Random(seed)
        self._shapes = [_shape(chooser, frames) for _ in range(count)]
        self._large_every = large_every
        self._large = _shape(chooser, _LARGE)

    def id(self, number: int) -> bytes:
        """Return the device_id, which is unique to the event, and the first cell of each of its rows."""
        return b"%b%09d" % (self.prefix, number)

    def number(self, device_id: bytes) -> int | None:
        """Return the event's number, or None when the id is not of this seed."""
        digits = device_id.removeprefix(self.prefix)
        if len(digits) < 9 or not digits.isdigit() or self.id(int(digits)) != device_id:
            return None
        return int(digits)

    def key(self, number: int) -> bytes | None:
        """Return the event's Idempotency-Key. Two events share each 16th key, which must lose neither of them."""
        if (key := self.batch_key(number)) is not None:
            return key
        if self._keyless_every and number % self._keyless_every == 0:
            return None
        return b"key-%b" % self.id(number - 1 if number % 16 == 15 else number)

    def batch_key(self, number: int) -> bytes | None:
        """Return the Idempotency-Key of the event's batch, if it is in one."""
        batch = number // BATCH_EVENTS
        if not self._batch_every or batch % self._batch_every:
            return None
        return b"batch-%d-%b" % (batch, self.prefix)

    def body(self, number: int, variant: int = 0) -> bytes:
        """Return the event as JSON, compact or in another of VARIANTS that mean the same."""
        shape = self._of(number)
        variant %= VARIANTS
        encoded = shape.body if variant == 0 else _encode_otherwise(shape.document, variant)
        return encoded.replace(_PLACE.encode(), self.id(number))

    def rows(self, number: int) -> list[bytes]:
        """Return the event's rows in the CSV, as whole lines, each one different."""
        own = self.id(number)
        return [row.replace(_PLACE.encode(), own) for row in self._of(number).rows]

    def _of(self, number: int) -> _Shape:
        if self._large_every and number % self._large_every == self._large_every - 1:
            return self._large
        return self._shapes[number * 7919 % len(self._shapes)]


def encode_row(cells: Sequence[object]) -> bytes:
    """Return one record in the dialect of the CSV."""
    line = io.StringIO()
    csv.writer(line, delimiter=";").writerow(cells)
    return line.getvalue().encode()


def _shape(chooser: random.Random, frames: Frames | None) -> _Shape:
    def text() -> str:
        return chooser.choice(_AWKWARD) + f"<{_PLACE}>" * chooser.randrange(2)

    def identity() -> str | int:
        return chooser.randrange(-5, 10**12) if chooser.random() < 0.2 else text()

    def number() -> float | int | str:
        value = round(chooser.random(), chooser.choice((2, 6, 17)))
        return chooser.choice((value, value, value, chooser.randrange(-1, 3), repr(value), "1e-7"))

    document = {
        "device_id": _PLACE,
        "client_id": identity(),
        "created_at": chooser.choice(("2024-05-01T12:00:00Z", "2024-05-01 12:00:00.123456+02:00", 1714557600)),
        "data": {
            "license_id": identity(),
            "preds": [
                {
                    "image_frame": f"{index}/{_PLACE}/{_frame(chooser, frames)}",
                    "prob": number(),
                    "tags": chooser.sample(_TAGS, chooser.randrange(4)),
                }
                for index in range(frames.count if frames else chooser.randrange(11))
            ],
        },
    }
    return _Shape(document, _compact(document), tuple(_rows(document)))


def _frame(chooser: random.Random, frames: Frames | None) -> str:
    if frames is None:
        return chooser.choice(_AWKWARD)
    return base64.b64encode(chooser.randbytes(frames.size_bytes))[: frames.size_bytes].decode()


def _rows(document: dict[str, Any]) -> list[bytes]:
    data = document["data"]
    common = [str(document[name]) for name in ("device_id", "client_id", "created_at")] + [str(data["license_id"])]
    rows = []
    for pred in data["preds"]:
        prob = float(pred["prob"])
        tags = io.StringIO()
        csv.writer(tags, lineterminator="").writerow([*pred["tags"], *["low_prob"] * (prob < LOW_PROB_THRESHOLD)])
        rows.append(encode_row([*common, pred["image_frame"], prob, tags.getvalue()]))
    return rows


def _compact(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _encode_otherwise(document: dict[str, Any], variant: int) -> bytes:
    if variant == 1:
        return json.dumps(document, indent=2).encode()  # blanks, and \u escapes
    if variant == 2:
        return _compact({**dict(reversed(document.items())), "firmware": {"version": [1, None]}})
    data = document["data"]
    preds = [{**pred, "prob": repr(float(pred["prob"]))} for pred in data["preds"]]
    ids = {name: str(document[name]) for name in ("client_id", "created_at", "device_id")}
    return _compact({"data": {"preds": preds, "license_id": str(data["license_id"])}, **ids})
