"""The load: generated, seeded events, the CSV rows they must become, and requests made of them. Pure.

The rows come from a plain reading of the contract with csv.writer, not from the project's own encoder, so that a drain
is known to have written the right number of bytes.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from dataclasses import dataclass

HEADER = b"device_id;client_id;created_at;license_id;image_frame;prob;tags\r\n"
TAGS = ("cat", "dog", "animal", "person", "car", "truck", "indoor", "outdoor", "face", "plate")


@dataclass(frozen=True, slots=True)
class Load:
    """`bodies[i]` is the JSON of one event, `rows[i]` its CSV rows, `predictions[i]` their number."""

    bodies: list[bytes]
    rows: list[bytes]
    predictions: list[int]

    def describe(self) -> str:
        count = len(self.bodies)
        size_kb, preds = sum(map(len, self.bodies)) / count / 1000, sum(self.predictions) / count
        return f"{count:,} different events of {size_kb:.2f} KB with {preds:.1f} predictions on average"

    def csv_bytes(self, messages: int) -> int:
        """Size of the CSV, header included, after the first `messages` of the endless rotation."""
        turns, rest = divmod(messages, len(self.rows))
        return len(HEADER) + turns * sum(map(len, self.rows)) + sum(map(len, self.rows[:rest]))


def small(count: int = 1000, seed: int = 36) -> Load:
    """Events of 1 to 10 predictions with short frame names."""
    rng = random.Random(seed)
    return _load([_event(rng, [_frame_name(rng) for _ in range(rng.randint(1, 10))]) for _ in range(count)])


def with_frames(count: int = 40, frames: int = 5, frame_bytes: int = 20_000, seed: int = 8) -> Load:
    """Events whose predictions carry an image of `frame_bytes` each, in base64."""
    rng = random.Random(seed)

    def image() -> str:
        return base64.b64encode(rng.randbytes(frame_bytes)).decode()

    return _load([_event(rng, [image() for _ in range(frames)]) for _ in range(count)])


def numbered(count: int, seed: int = 9) -> Load:
    """Small events whose device_id is a number of eight digits, so that a row tells which event it came from."""
    rng = random.Random(seed)
    names = [[_frame_name(rng) for _ in range(rng.randint(1, 10))] for _ in range(count)]
    return _load([_event(rng, frames) | {"device_id": f"{i:08d}"} for i, frames in enumerate(names)])


_HEAD = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/%b\r\nContent-Length: %d\r\n\r\n"


def post_request(body: bytes) -> bytes:
    """One complete POST /process."""
    return _HEAD % (b"/process", b"json", len(body)) + body


def post_lines(body: bytes) -> bytes:
    """One complete POST /process/batch of NDJSON."""
    return _HEAD % (b"/process/batch", b"x-ndjson", len(body)) + body


def _load(events: list[dict[str, object]]) -> Load:
    # Half as Python's json.dumps writes them, half as JSON.stringify does: devices send both.
    bodies = [json.dumps(event, separators=(",", ":") if i % 2 else None).encode() for i, event in enumerate(events)]
    documents = [json.loads(body) for body in bodies]
    return Load(bodies, [_rows(d) for d in documents], [len(d["data"]["preds"]) for d in documents])


def _event(rng: random.Random, frames: list[str]) -> dict[str, object]:
    preds = [
        {
            "image_frame": frame,
            "prob": round(rng.random(), 4),
            "tags": rng.sample(TAGS, rng.randint(0, 3)),
        }
        for frame in frames
    ]
    return {
        "device_id": f"camera-{rng.randrange(10_000):04d}",
        "client_id": f"client-{rng.randrange(100):02d}",
        "created_at": f"2024-05-{rng.randint(1, 28):02d}T{rng.randrange(24):02d}:{rng.randrange(60):02d}:00.000Z",
        "data": {"license_id": f"license-{rng.randrange(1000):03d}", "preds": preds},
    }


def _frame_name(rng: random.Random) -> str:
    return f"frame-{rng.getrandbits(48):012x}.jpg"


def _rows(event: dict[str, object]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=";")
    data = event["data"]
    assert isinstance(data, dict)
    for pred in data["preds"]:
        tags = pred["tags"] + (["low_prob"] if pred["prob"] < 0.25 else [])
        writer.writerow(
            [event["device_id"], event["client_id"], event["created_at"], data["license_id"],
             pred["image_frame"], pred["prob"], ",".join(tags)]
        )  # fmt: skip
    return out.getvalue().encode()
