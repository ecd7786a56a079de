"""The hot frames, against pamqp's own coding of them."""

from __future__ import annotations

import datetime
from itertools import pairwise
from typing import Any

import pamqp.commands as commands
import pamqp.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from common.amqp.codec import (
    HEARTBEAT,
    HOT_CHANNEL,
    JSON,
    NDJSON,
    Confirm,
    Delivery,
    FrameDecoder,
    FrameError,
    Notice,
    PublishEncoder,
    ack_frame,
    packed_seconds,
)
from common.amqp.properties import message_id_of

Frame = tuple[int, object]  # channel, pamqp frame

short = st.text(max_size=40).filter(lambda text: len(text.encode()) <= 200)
exchange = st.sampled_from(["", "amq.direct"])
tags = st.integers(1, 2**63 - 1)


@st.composite
def properties(draw: st.DrawFn) -> commands.Basic.Properties:
    def optional(of: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | of)

    return commands.Basic.Properties(
        content_type=optional(short),
        content_encoding=optional(short),
        headers=optional(st.dictionaries(short.filter(bool), st.integers(0, 100) | short, max_size=3)),
        delivery_mode=optional(st.integers(1, 2)),
        priority=optional(st.integers(0, 9)),
        correlation_id=optional(short),
        reply_to=optional(short),
        expiration=optional(short),
        message_id=optional(short.filter(bool)),
        timestamp=optional(st.just(datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))),
    )


@st.composite
def content(draw: st.DrawFn, channel: int, frame_max: int = 64) -> list[Frame]:
    """A delivered or returned message, in one or more body frames."""
    body = draw(st.binary(max_size=200))
    method: object
    if draw(st.booleans()):
        method = commands.Basic.Deliver(draw(short), draw(tags), draw(st.booleans()), draw(exchange), draw(short))
    else:
        method = commands.Basic.Return(312, draw(short), draw(exchange), draw(short))
    pieces = [ContentBody(body[at : at + frame_max]) for at in range(0, len(body), frame_max)]
    header = ContentHeader(body_size=len(body), properties=draw(properties()))
    return [(channel, method), (channel, header), *[(channel, piece) for piece in pieces]]


def single(channel: int) -> st.SearchStrategy[list[Frame]]:
    return st.one_of(
        st.builds(commands.Basic.Ack, tags, st.booleans()),
        st.builds(commands.Basic.Nack, tags, st.booleans(), st.booleans()),
        st.just(commands.Queue.DeclareOk("q", 1, 1)),
        st.just(commands.Basic.ConsumeOk("tag")),
    ).map(lambda frame: [(channel, frame)])


control = st.one_of(
    st.just(Heartbeat()),
    st.builds(commands.Connection.Blocked, short),
    st.just(commands.Connection.Unblocked()),
).map(lambda frame: [(0, frame)])


@st.composite
def streams(draw: st.DrawFn) -> list[Frame]:
    """Frames as a broker can send them: those of one message in order, those of other channels anywhere between."""
    lanes = [
        [frame for item in draw(st.lists(content(channel) | single(channel), max_size=4)) for frame in item]
        for channel in (HOT_CHANNEL, 2)
    ]
    lanes.append([frame for item in draw(st.lists(control, max_size=3)) for frame in item])
    merged: list[Frame] = []
    while any(lanes):
        merged.append(draw(st.sampled_from([lane for lane in lanes if lane])).pop(0))
    return merged


def wire(frame: Frame) -> bytes:
    return bytes(pamqp.frame.marshal(frame[1], frame[0]))  # type: ignore[arg-type]


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def by_pamqp(stream: list[Frame]) -> tuple[list[Delivery], list[Confirm], list[Notice], bytes, list[str | None]]:
    """Return what the decoder must find, from pamqp's own frames."""
    deliveries, confirms, notices, cold, ids = [], [], [], b"", []
    method: object = None
    header: ContentHeader | None = None
    body = b""
    for channel, frame in stream:
        if channel != HOT_CHANNEL:
            cold += wire((channel, frame))
            if isinstance(frame, commands.Connection.Blocked):
                notices.append(Notice("blocked", frame.reason or "no reason given"))
            if isinstance(frame, commands.Connection.Unblocked):
                notices.append(Notice("blocked", ""))
            continue
        if isinstance(frame, commands.Basic.Ack | commands.Basic.Nack):
            confirms.append(Confirm(frame.delivery_tag, frame.multiple, isinstance(frame, commands.Basic.Ack)))
        elif isinstance(frame, commands.Basic.Deliver | commands.Basic.Return):
            method, body = frame, b""
            if isinstance(frame, commands.Basic.Return):
                notices.append(Notice("lost", f"returned: {frame.reply_text}"))
        elif isinstance(frame, ContentHeader):
            header = frame
        elif isinstance(frame, ContentBody):
            body += frame.value
        else:
            cold += wire((channel, frame))
        if header is not None and len(body) == header.body_size:
            if isinstance(method, commands.Basic.Deliver):
                raw = wire((channel, header))[7:-1]
                deliveries.append(Delivery(method.delivery_tag or 0, method.redelivered, raw, body))
                ids.append(header.properties.message_id)
            header = None
    return deliveries, confirms, notices, cold, ids


@given(streams(), st.lists(st.integers(0, 5000), max_size=6))
def test_any_stream_split_anywhere_decodes_as_pamqp_does(stream: list[Frame], cuts: list[int]) -> None:
    data = b"".join(wire(frame) for frame in stream)
    decoder = FrameDecoder()
    cold = b"".join(decoder.feed(piece) for piece in split(data, cuts))
    deliveries, confirms, notices, expected_cold, ids = by_pamqp(stream)
    assert decoder.deliveries == deliveries
    assert decoder.confirms == confirms
    assert decoder.notices == notices
    assert cold == expected_cold
    assert [message_id_of(delivery.header) for delivery in decoder.deliveries] == [
        None if text is None else text.encode() for text in ids
    ]


def test_a_stream_split_at_every_byte_decodes_the_same() -> None:
    encoder = PublishEncoder("predictions", 64)
    message = b"".join(encoder.encode(b"x" * 150, b"0123456789abcdef" * 2, packed_seconds(7)))
    content_frames = message[message.index(b"\xce") + 1 :]
    deliver = wire((1, commands.Basic.Deliver("tag", 5, True, "", "predictions")))
    data = wire((1, commands.Basic.Ack(3, True))) + deliver + content_frames + wire((0, Heartbeat()))
    for cut in range(len(data) + 1):
        decoder = FrameDecoder()
        assert decoder.feed(data[:cut]) + decoder.feed(data[cut:]) == HEARTBEAT
        assert decoder.confirms == [(3, True, True)]
        [delivery] = decoder.deliveries
        assert (delivery.delivery_tag, delivery.redelivered, delivery.body) == (5, True, b"x" * 150)
        assert message_id_of(delivery.header) == b"0123456789abcdef" * 2
    decoder = FrameDecoder()
    assert b"".join(decoder.feed(data[at : at + 1]) for at in range(len(data))) == HEARTBEAT
    assert len(decoder.deliveries) == 1


@pytest.mark.parametrize("frame_max", [64, 4096])
def test_a_body_is_published_without_a_copy(frame_max: int) -> None:
    body = bytes(150)
    parts = PublishEncoder("predictions", frame_max).encode(body, b"a" * 32, packed_seconds(7))
    assert sum(len(part) for part in parts if (part.obj if isinstance(part, memoryview) else part) is body) == 150


@pytest.mark.parametrize("content_type", [JSON, NDJSON])
@pytest.mark.parametrize("size", [1, 55, 56, 57, 112, 113, 1000])
def test_pamqp_reads_a_published_message_of_any_size(size: int, content_type: bytes) -> None:
    """No frame is above frame_max."""
    body = bytes(range(256)) * 4
    encoder = PublishEncoder("predictions", 64 + 64, content_type)
    data = b"".join(encoder.encode(body[:size], b"a" * 32, packed_seconds(1_700_000_000)))
    read, sizes = [], []
    while data:
        used, channel, frame = pamqp.frame.unmarshal(data)
        assert channel == HOT_CHANNEL
        read.append(frame)
        sizes.append(used)
        data = data[used:]
    publish, header, *bodies = read
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory, publish.immediate) == (
        "",
        "predictions",
        True,
        False,
    )
    assert isinstance(header, ContentHeader)
    assert header.body_size == size
    given = header.properties
    assert (given.content_type, given.delivery_mode, given.message_id) == (content_type.decode(), 2, "a" * 32)
    assert given.timestamp == datetime.datetime.fromtimestamp(1_700_000_000, datetime.UTC)
    assert b"".join(piece.value for piece in bodies if isinstance(piece, ContentBody)) == body[:size]
    assert max(sizes[2:]) <= 128


def test_a_header_above_frame_max_is_read_cut_anywhere() -> None:
    """RabbitMQ does not split it, and adds to it: for example x-death, to a header that just fitted."""
    big = commands.Basic.Properties(message_id="m", headers={"x": "y" * 5000})
    frames = [commands.Basic.Deliver("t", 1, True, "", "q"), ContentHeader(body_size=1, properties=big)]
    data = b"".join(wire((1, frame)) for frame in [*frames, ContentBody(b"x")])
    for cut in range(len(data) + 1):
        decoder = FrameDecoder()
        decoder.frame_max = 4096
        assert decoder.feed(data[:cut]) + decoder.feed(data[cut:]) == b""
        [delivery] = decoder.deliveries
        assert (delivery.body, message_id_of(delivery.header)) == (b"x", b"m")


def test_an_ack_is_what_pamqp_writes() -> None:
    expected = wire((1, commands.Basic.Ack(2**40 + 1, True))) + wire((1, commands.Basic.Ack(7, False)))
    assert ack_frame(2**40 + 1, multiple=True) + ack_frame(7, multiple=False) == expected


@pytest.mark.parametrize(
    ("stream", "what"),
    [
        (b"\x01\x00\x01\x00\x00\x00\x01x!", "end octet"),
        (b"\x01\x00\x01\x00\x10\x00\x00", "frame_max"),
        (b"\x02\x00\x02\x00\x10\x00\x00", "frame_max"),
        (b"\x02\x00\x01\x01\x00\x00\x00", "frame_max"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "TLS"),
        (b"AMQP\x00\x00\x09\x00", "it speaks another protocol"),
        (wire((1, commands.Basic.Deliver("t", 1, False, "", "q"))) * 2, "inside a message"),
        (wire((1, commands.Basic.Deliver("t", 1, False, "", "q"))) + wire((1, ContentBody(b"x"))), "unexpected frame"),
        (
            wire((1, commands.Basic.Deliver("t", 1, False, "", "q")))
            + wire((1, ContentHeader(body_size=1, properties=commands.Basic.Properties())))
            + wire((1, ContentBody(b"xy"))),
            "longer than its header",
        ),
    ],
)
def test_what_is_not_amqp_is_refused_and_not_guessed(stream: bytes, what: str) -> None:
    decoder = FrameDecoder()
    decoder.frame_max = 4096
    with pytest.raises(FrameError, match=what):
        decoder.feed(stream + b"\x00")


@pytest.mark.parametrize(
    ("frame", "notice"),
    [
        ((1, commands.Basic.Cancel("tag", False)), Notice("lost", "the broker cancelled the consumer")),
        (
            (1, commands.Channel.Close(406, "PRECONDITION_FAILED", 60, 80)),
            Notice("lost", "closed: PRECONDITION_FAILED"),
        ),
        ((0, commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0)), Notice("lost", "closed: CONNECTION_FORCED")),
    ],
)
def test_the_end_of_a_channel_is_noticed_and_passed_on(frame: Frame, notice: Notice) -> None:
    decoder = FrameDecoder()
    assert decoder.feed(wire(frame)) == wire(frame)
    assert decoder.notices == [notice]


def test_an_empty_message_id_is_no_id() -> None:
    properties = commands.Basic.Properties(message_id="x", delivery_mode=2)
    header = wire((1, ContentHeader(body_size=1, properties=properties)))[7:-1]
    assert message_id_of(header) == b"x"
    assert message_id_of(header.replace(b"\x01x", b"\x00")) is None
