"""Events as the producer publishes them, and messages as the broker delivers them."""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path
from typing import Any

import aiormq
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from common.amqp.codec import Delivery
from common.amqp.topology import QUEUE_ARGUMENTS
from common.event.document import write_json


def event(device: str = "device", frame: str = "frame") -> bytes:
    """An event with one prediction, in normal form."""
    preds = [{"image_frame": frame, "prob": 0.5, "tags": ["cat"]}]
    data = {"license_id": "l", "preds": preds}
    return write_json({"device_id": device, "client_id": "c", "created_at": "t", "data": data})


def event_line(event_id: str, device: str = "device") -> bytes:
    """The same event as a line of a message with several events."""
    return b'{"message_id":"%b",' % event_id.encode() + event(device)[1:]


def delivery(tag: int, body: bytes = b"", redelivered: bool = False, **properties: Any) -> Delivery:
    """A delivered message; without a `body`, it has an event of its own."""
    body = body or event(f"device-{tag}")
    properties = {"message_id": f"{tag:032x}"} | properties
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(**properties))
    return Delivery(tag, redelivered, header.marshal(), body)


def group(tag: int, *lines: bytes, redelivered: bool = False, **properties: Any) -> Delivery:
    """A delivered message of several lines."""
    return delivery(tag, b"\n".join(lines), redelivered, content_type="application/x-ndjson", **properties)


def publish(url: str, queue_name: str, bodies: list[bytes], **properties: Any) -> None:
    """Declare the queue, publish, and wait until all is confirmed."""

    async def run() -> None:
        async with aiormq.connect(url) as connection:
            channel = await connection.channel()
            await channel.queue_declare(queue_name, durable=True, arguments=dict(QUEUE_ARGUMENTS))
            made = [Basic.Properties(delivery_mode=2, **properties) for _ in bodies]
            publishing = [
                channel.basic_publish(body, routing_key=queue_name, properties=each)
                for body, each in zip(bodies, made, strict=True)
            ]
            await asyncio.gather(*publishing)

    asyncio.run(run())


async def waiting(url: str, queue_name: str) -> int:
    """The messages in a queue that nobody has got."""
    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        return (await channel.queue_declare(queue_name, passive=True)).message_count or 0


def devices(csv_file: Path) -> list[str]:
    """The device of each row."""
    if not csv_file.exists():
        return []
    with csv_file.open(newline="") as file:
        return [row[0] for row in csv.reader(file, delimiter=";")][1:]
