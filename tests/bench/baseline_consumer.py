"""The consumer as a competent user would build it today: aio-pika, prefetch, manual ack, csv.writer, flush.

It promises less than ours: no fsync, and a crash leaves torn or duplicated rows.
"""

from __future__ import annotations

import asyncio
import csv
import os
from pathlib import Path

import aio_pika
import orjson
import uvloop

from common.amqp.topology import QUEUE_ARGUMENTS

HEADER = ("device_id", "client_id", "created_at", "license_id", "image_frame", "prob", "tags")
LOW_PROB_THRESHOLD = 0.25


async def main() -> None:
    path = Path(os.environ["CSV_FILE"])
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        if file.tell() == 0:
            writer.writerow(HEADER)
            file.flush()

        async def handle(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            event = orjson.loads(message.body)
            data = event["data"]
            for pred in data["preds"]:
                if pred["prob"] < LOW_PROB_THRESHOLD:
                    pred["tags"].append("low_prob")
            writer.writerows(
                (
                    event["device_id"], event["client_id"], event["created_at"], data["license_id"],
                    pred["image_frame"], pred["prob"], ",".join(pred["tags"]),
                )
                for pred in data["preds"]
            )  # fmt: skip
            file.flush()
            await message.ack()

        connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
        async with connection:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=int(os.environ["PREFETCH_COUNT"]))
            queue = await channel.declare_queue(os.environ["QUEUE_NAME"], durable=True, arguments=dict(QUEUE_ARGUMENTS))
            await queue.consume(handle)
            await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
