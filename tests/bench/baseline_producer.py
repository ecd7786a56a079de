"""The producer as a competent user would build it today: FastAPI, pydantic 2, uvicorn (uvloop, httptools), aio-pika.

Its promise is ours up to the broker: 200 after the publisher confirm, persistent, mandatory, quorum queue.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import uuid4

import aio_pika
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict

from common.amqp.topology import QUEUE_ARGUMENTS

QUEUE_NAME = os.environ["QUEUE_NAME"]


class Model(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)


class Prediction(Model):
    image_frame: str
    prob: float
    tags: list[str]


class Data(Model):
    license_id: str
    preds: list[Prediction]


class Event(Model):
    device_id: str
    client_id: str
    created_at: str
    data: Data


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
    async with connection:
        channel = await connection.channel(publisher_confirms=True)
        await channel.declare_queue(QUEUE_NAME, durable=True, arguments=dict(QUEUE_ARGUMENTS))
        app.state.exchange = channel.default_exchange
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/readyz")
async def readyz() -> Response:
    return Response()


@app.post("/process")
async def process(event: Event) -> Response:
    body = event.model_dump_json().encode()
    message = aio_pika.Message(
        body,
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=uuid4().hex,
        timestamp=datetime.now(UTC),
    )
    await app.state.exchange.publish(message, routing_key=QUEUE_NAME, mandatory=True)
    return Response(body, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        app, port=int(os.environ["HTTP_PORT"]), loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )
