"""The API without a broker: what is answered, when, and what went out; batches, tokens, origins, partitions."""

from __future__ import annotations

import uuid
from itertools import islice
from typing import Any

import pytest

from common.config import ProducerSettings
from common.http.tokens import parse_tokens
from common.producer.intake import PARSED_FACTOR, random_uuids
from common.producer.service import limits_of
from tests.support.polling import wait_until
from tests.support.producer import Answer, FakeProducer, an_event, post
from tests.support.published import published

GET_READY = b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n"


def test_ids_without_a_key_are_random_version_4_uuids() -> None:
    ids = list(islice(random_uuids(), 1000))
    assert len(set(ids)) == 1000
    for text in ids:
        made = uuid.UUID(text.decode())
        assert (made.version, made.variant, made.hex.encode()) == (4, uuid.RFC_4122, text)


@pytest.mark.parametrize("packed", [False, True])
def test_an_event_is_answered_when_it_is_confirmed(packed: bool) -> None:
    producer = FakeProducer()
    assert producer.send(post("/process", an_event(preds=3), packed=packed)) == []
    (answer,) = producer.confirm(1)
    assert (answer.status, answer.content) == (200, an_event(preds=3))
    assert producer.counters.metrics.values[producer.counters.predictions] == 3


def test_pipelined_events_are_answered_in_order() -> None:
    """A small event, one in slices, and a refusal: confirmed from the last to the first."""
    producer = FakeProducer()
    requests = post("/process", an_event("0")), post("/process", an_event("1"), packed=True), post("/process", b"{}")
    assert producer.send(*requests) == []
    assert producer.confirm(2) == []
    answers = producer.confirm(1)
    assert [answer.status for answer in answers] == [200, 200, 422]
    assert [answer.content["device_id"] for answer in answers[:2]] == ["0", "1"]


def test_a_nack_is_503_and_counted_by_its_reason() -> None:
    producer = FakeProducer()
    producer.send(post("/process", an_event()))
    (answer,) = producer.confirm(1, ok=False)
    assert answer.status == 503
    assert 1 <= int(answer.fields["retry-after"]) <= 5
    assert producer.refusals("nacked") == 1


def test_without_a_broker_an_event_is_503_that_names_no_address() -> None:
    producer = FakeProducer()
    producer.publishers[0].down("no broker at amqp://secret.host:5672")
    for path, body in (("/process", an_event()), ("/process/batch", [an_event()])):
        (answer,) = producer.send(post(path, body))
        assert answer.status == 503
        assert "secret.host" not in answer.content["detail"]
    assert producer.refusals("broker_away") == 2


def test_retry_after_varies_and_is_longer_without_a_broker() -> None:
    """Ten thousand devices must not return in the same second."""
    producer = FakeProducer()
    producer.publishers[0].down("cut")
    answers = [answer for _ in range(100) for answer in producer.send(post("/process", an_event()))]
    seconds = {int(answer.fields["retry-after"]) for answer in answers}
    assert len(seconds) > 5
    assert seconds <= set(range(5, 16))


@pytest.mark.parametrize("target", ["/process/", "/process?x=%zz", "/process?<\xe9>"])
def test_a_target_of_a_device_of_the_original_is_process(target: str) -> None:
    producer = FakeProducer()
    request = post(target, an_event()).replace("\xe9".encode(), b"\xe9")
    producer.send(
        request.replace(b"Host: h", b"Host: h\r\nContent-Encoding: \r\nContent-Type: application/json;charset=")
    )
    (answer,) = producer.confirm(1)
    assert answer.status == 200
    counters = producer.counters
    assert counters.metrics.values[counters.requests["/process"][200]] == 1


# Batches


def batch(count: int) -> bytes:
    return post("/process/batch", [an_event(str(number)) for number in range(count)])


def test_a_batch_is_answered_when_its_last_event_is_confirmed() -> None:
    producer = FakeProducer()
    assert producer.send(post("/process/batch", [an_event(), {}, an_event()])) == []
    assert producer.confirm(2) == []
    (answer,) = producer.confirm(1)
    assert answer.status == 207
    assert answer.content["accepted"] == 2
    assert [result["status"] for result in answer.content["results"]] == [200, 422, 200]


def test_a_batch_waits_for_the_window_and_leaves_half_of_it() -> None:
    producer = FakeProducer(max_unconfirmed=8)
    assert producer.send(batch(10)) == []
    assert producer.publishers[0].unconfirmed == 4
    single = producer.send(post("/process", an_event("single")), GET_READY)
    assert single == []  # after the batch on this connection; not refused
    assert producer.publishers[0].unconfirmed == 5
    answers = [answer for tag in range(1, 12) for answer in producer.confirm(tag)]
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert answers[0].content["accepted"] == 10


def test_a_batch_that_finds_no_room_in_time_is_refused() -> None:
    producer = FakeProducer(confirm_timeout_ms=500)
    producer.lanes[0].congested = True
    assert producer.send(batch(3)) == []
    answers: list[Answer] = []

    def answered() -> bool:
        producer.api.tick(0)
        answers.extend(producer.run())
        return bool(answers)

    wait_until("an answer", answered)
    assert answers[0].status == 207
    assert [result["status"] for result in answers[0].content["results"]] == [503] * 3
    assert producer.refusals("window_full") == 3


def test_a_nack_in_a_batch_is_that_events_own() -> None:
    producer = FakeProducer()
    producer.send(batch(3))
    producer.confirm(3)
    producer.confirm(2, ok=False)
    (answer,) = producer.confirm(1)
    assert [result["status"] for result in answer.content["results"]] == [200, 503, 200]


def test_an_event_beyond_the_brokers_size_is_413_in_a_batch() -> None:
    producer = FakeProducer()
    producer.send(post("/process", an_event("x" * 500)))
    producer.publishers[0].down("PRECONDITION_FAILED - message size 600 is larger than configured max size 300")
    (single,) = producer.run()
    assert single.status == 413
    producer.publishers[0].down("PRECONDITION_FAILED - message size 600 is larger than configured max size 300")
    producer.publishers[0].link_up(producer.lanes[0], 131_072)
    assert producer.send(post("/process/batch", [an_event("x" * 500), an_event()])) == []
    (answer,) = producer.confirm(1)
    assert [result["status"] for result in answer.content["results"]] == [413, 200]


def test_a_key_gives_each_event_of_a_batch_its_own_lasting_id() -> None:
    ids = []
    for _ in range(2):
        producer = FakeProducer()
        producer.send(post("/process/batch", [an_event(), an_event()], Idempotency_Key="k"))
        ids.append([message.message_id for message in published(b"".join(producer.lanes[0].sent))])
    assert ids[0] == ids[1]
    assert ids[0][0] != ids[0][1]


def test_events_of_one_turn_share_a_message_and_its_confirm() -> None:
    """There are pipelined requests, and a batch, which is read a turn later. Each event is answered and counted."""
    producer = FakeProducer(events_per_message=64)
    singles = [post("/process", an_event(f"d{number}")) for number in range(3)]
    assert producer.send(*singles, post("/process/batch", [an_event("b1"), an_event("b2")])) == []
    messages = published(b"".join(producer.lanes[0].sent))
    assert [len(message.event_ids) for message in messages] == [3, 2]
    *answers, batch = producer.confirm(2, multiple=True)
    assert [answer.content["device_id"] for answer in answers] == ["d0", "d1", "d2"]
    assert [result["status"] for result in batch.content["results"]] == [200, 200]
    counters = producer.counters
    assert [counters.metrics.values[index] for index in (counters.events, counters.messages)] == [5, 2]


def test_a_scrape_after_the_events_of_its_connection_counts_all() -> None:
    """The first answer makes room in the pipeline, so /metrics is asked in the middle of the confirm."""
    producer = FakeProducer(events_per_message=64)
    producer.send(*[post("/process", an_event())] * 32, b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
    assert [answer.status for answer in producer.confirm(1)] == [200] * 33
    counters = producer.counters
    assert [counters.metrics.values[index] for index in (counters.events, counters.messages)] == [32, 1]


@pytest.mark.parametrize(
    ("path", "content_type", "accept"),
    [
        ("/process", "application/x-ndjson", "application/json"),
        ("/process/batch", "text/plain", "application/json, application/x-ndjson"),
    ],
)
def test_content_that_a_route_does_not_accept_is_415(path: str, content_type: str, accept: str) -> None:
    """NDJSON is accepted for a batch only."""
    (answer,) = FakeProducer().send(post(path, an_event(), Content_Type=content_type))
    assert (answer.status, answer.fields["accept"]) == (415, accept)


# Partitions


def test_a_partition_that_is_down_refuses_its_devices_only() -> None:
    """`camera-7` is of partition 1 of 4, `17` of 2, "" of 0."""
    producer = FakeProducer(partitions=4)
    producer.publishers[1].down("cut")
    (refused,) = producer.send(post("/process", an_event("camera-7")))
    assert refused.status == 503
    assert producer.refusals("partition_down") == 1
    producer.send(post("/process", an_event("17")))
    (answer,) = producer.confirm(1, partition=2)
    assert answer.status == 200
    producer.send(post("/process/batch", [an_event("camera-7"), an_event("")]))
    (answer,) = producer.confirm(1, partition=0)
    assert [result["status"] for result in answer.content["results"]] == [503, 200]


# Who may come in


@pytest.mark.parametrize(
    ("given", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic b", 401), ("Bearer one", 200), ("bearer  two", 200)],
)
def test_a_token_is_needed_where_one_is_set(given: str | None, status: int) -> None:
    producer = FakeProducer(api_token="one,two")
    for path, body in (("/process", an_event()), ("/process/batch", [an_event()])):
        request = post(path, body) if given is None else post(path, body, Authorization=given)
        answers = producer.send(request)
        answers += producer.confirm(1, multiple=True) + producer.confirm(2, multiple=True)
        assert [answer.status for answer in answers] == [status]
    assert bool(producer.lanes[0].sent) == (status == 200)


def token_requests(producer: FakeProducer) -> dict[str, float]:
    values = producer.counters.metrics.values
    return {name: values[index] for name, index in producer.counters.token_requests.items()}


def test_requests_are_counted_by_the_owner_of_their_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "predlog.http")
    producer = FakeProducer(api_token="shop-1:one,two,shop-1:three")
    for token in ("one", "shop-1:one", "three", "two", "wr0ng", "shop-1:wr0ng", "token-2:two"):
        producer.send(post("/process", an_event(), Authorization=f"Bearer {token}"))
    assert len(producer.lanes[0].sent) == 4
    assert token_requests(producer) == {"shop-1": 3, "token-2": 1, "other": 0}
    assert "/process from shop-1" in caplog.text
    assert "wr0ng" not in caplog.text


def test_tokens_are_replaced_while_it_runs() -> None:
    producer = FakeProducer(api_token="shop-1:one")
    with pytest.raises(ValueError, match="name:token"):
        producer.api.reload_tokens("shop-2:")
    producer.api.reload_tokens("shop-1:new,shop-2:two")
    for token, status in (("one", 401), ("new", 200), ("two", 200)):
        tag = len(producer.lanes[0].sent) + 1
        answers = producer.send(post("/process", an_event(), Authorization=f"Bearer {token}")) + producer.confirm(tag)
        assert [answer.status for answer in answers] == [status]
    assert token_requests(producer) == {"shop-1": 1, "other": 1}
    producer.api.reload_tokens("")
    assert b'"security"' not in document(producer)
    producer.send(post("/process", an_event()))
    assert producer.confirm(3)[0].status == 200


def document(producer: FakeProducer) -> bytes:
    (answer,) = producer.send(b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n")
    return repr(answer.content).replace("'", '"').encode()


@pytest.mark.parametrize("text", [",", "a b", "é", "shop-1:,x", "\n"])
def test_a_bad_list_of_tokens_is_one_line_without_a_token(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|has) [^\n]+$") as caught:
        parse_tokens(f"s3cret{text}" if text != "," else text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("item", "name", "credentials"),
    [
        ("abc", "token-1", (b"abc",)),
        ("shop-1:abc", "shop-1", (b"abc", b"shop-1:abc")),
        ("a:b:c", "a", (b"b:c", b"a:b:c")),
        ("a/b:c", "token-1", (b"a/b:c",)),
        ("x" * 33 + ":c", "token-1", (b"x" * 33 + b":c",)),
        (":c", "token-1", (b":c",)),
    ],
)
def test_a_token_may_have_a_name_in_front(item: str, name: str, credentials: tuple[bytes, ...]) -> None:
    assert parse_tokens(item) == [(name, credentials)]


def test_a_body_in_pieces_is_refused_by_its_head() -> None:
    producer = FakeProducer(api_token="one")
    (answer,) = producer.send(post("/process", an_event())[:-20])
    assert answer.status == 401


ORIGINS: list[tuple[dict[str, str], int]] = [
    ({}, 200),
    ({"Origin": "http://h"}, 200),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "HTTPS://H:443"}, 200),
    ({"Origin": "http://h:8000"}, 403),
    ({"Origin": "http://h:8000", "Host": "h:8000"}, 200),
    ({"Origin": "http://h", "Host": "h:80"}, 200),
    ({"Origin": "https://h", "Host": "h:80"}, 403),
    ({"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, 200),
    ({"Origin": "http://h.evil.example"}, 403),
    ({"Origin": "ftp://h"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "null", "Host": ""}, 403),
    ({"Origin": ""}, 403),
    ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"Sec_Fetch_Site": "same-site"}, 403),
    ({"Origin": "http://evil.example", "Sec_Fetch_Site": "cross-site"}, 403),
    ({"Sec_Fetch_Site": "none"}, 200),
    # A proxy that sends its own Host; the browser knows better, and no page can set this field.
    ({"Origin": "https://public.example", "Sec_Fetch_Site": "same-origin"}, 200),
    ({"Origin": "https://dash.example", "Sec_Fetch_Site": "cross-site"}, 200),
]


@pytest.mark.parametrize(("fields", "status"), ORIGINS, ids=str)
@pytest.mark.parametrize("path", ["/process", "/process/batch"])
def test_what_a_browser_sends_for_another_site_is_403(path: str, fields: dict[str, str], status: int) -> None:
    producer = FakeProducer(cors_origins="https://dash.example")
    body: Any = an_event() if path == "/process" else [an_event()]
    answers = producer.send(post(path, body, packed=False, **fields)) + producer.confirm(1)
    assert [answer.status for answer in answers] == [status]
    assert bool(producer.lanes[0].sent) == (status == 200)
    if status == 403:
        for value in (fields.get("Origin", "none"), fields.get("Host", "h")):
            assert value in answers[0].content["detail"]
    allowed = answers[0].fields.get("access-control-allow-origin")
    assert allowed == ("https://dash.example" if fields.get("Origin") == "https://dash.example" else None)


def preflight(origin: str) -> bytes:
    lines = f"Host: h\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\n"
    return f"OPTIONS /process HTTP/1.1\r\n{lines}\r\n".encode()


def test_a_preflight_is_answered_for_a_listed_origin_only() -> None:
    producer = FakeProducer(cors_origins="https://dash.example", api_token="one")
    yes, no = producer.send(preflight("https://dash.example"), preflight("https://evil.example"))
    assert yes.status == 204
    assert yes.fields["access-control-allow-origin"] == "https://dash.example"
    allowed = yes.fields["access-control-allow-headers"].split(", ")
    assert {"Authorization", "Idempotency-Key", "traceparent", "tracestate", "X-Requested-With"} <= set(allowed)
    assert no.status == 403


def test_answers_vary_by_origin_where_origins_are_listed() -> None:
    """A cache must not give one origin the answer to another."""
    page = "GET /openapi.json HTTP/1.1\r\nHost: h\r\n{}\r\n"
    for origin in ("", "Origin: https://dash.example\r\n", "Origin: https://evil.example\r\n"):
        (answer,) = FakeProducer(cors_origins="https://dash.example").send(page.format(origin).encode())
        assert answer.status == 200
        assert answer.fields["vary"] == "Origin"
        assert ("access-control-allow-origin" in answer.fields) == ("dash" in origin)
        (answer,) = FakeProducer().send(page.format(origin).encode())
        assert "vary" not in answer.fields


def test_the_host_of_the_target_counts_before_the_field() -> None:
    """RFC 9112 section 3.2.2 says so. Otherwise ALLOWED_HOSTS would judge by a name that was not called."""
    for target, host, status in (("a.example", "b.example", 200), ("b.example", "a.example", 403)):
        (answer,) = FakeProducer(allowed_hosts="a.example").send(
            f"GET http://{target}/openapi.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        )
        assert answer.status == status


@pytest.mark.parametrize(("host", "status"), [("a.example", 200), ("A.example:80", 200), ("b.example", 403)])
def test_a_host_that_is_not_listed_is_403(host: str, status: int) -> None:
    producer = FakeProducer(allowed_hosts="a.example")
    answers = producer.send(post("/process", an_event(), Host=host)) + producer.confirm(1)
    assert [answer.status for answer in answers] == [status]
    if status == 403:
        assert host in answers[0].content["detail"]
    (probe,) = producer.send(b"GET /healthz HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode())
    assert probe.status == status


# Readiness


def test_a_stop_that_is_announced_is_not_ready_but_takes_events() -> None:
    producer = FakeProducer()
    producer.api.announce_stop()
    assert producer.api.not_ready() == "the server is shutting down"
    (answer,) = producer.send(GET_READY)
    assert answer.status == 503
    producer.send(post("/process", an_event()))
    assert producer.confirm(1)[0].status == 200


def readiness(producer: FakeProducer) -> tuple[int, str]:
    """Return the status of /readyz, and what it says about partitions that take no events."""
    (answer,) = producer.send(GET_READY)
    return answer.status, answer.content.get("detail") or answer.content.get("down", "")


def test_readyz_is_200_while_one_partition_takes_events() -> None:
    """A load balancer that took the producer out would also take it from the healthy partitions."""
    producer = FakeProducer(partitions=4)
    producer.api.tick(0)
    assert readiness(producer) == (200, "")
    for partition, reason in ((0, "cut"), (2, "refused"), (3, "cut")):
        producer.publishers[partition].down(reason)
    assert readiness(producer) == (200, "partitions 0, 3: no broker: cut; partition 2: no broker: refused")
    producer.api.tick(0)
    assert [producer.counters.metrics.values[up] for up in producer.counters.partitions_up] == [0, 1, 0, 0]
    producer.publishers[1].blocked("low on memory")
    status, why = readiness(producer)
    assert status == 503
    assert "partition 1: the broker takes no messages now (low on memory)" in why
    producer.publishers[3].link_up(producer.lanes[3], 131_072)
    assert readiness(producer)[0] == 200


def test_a_start_is_ready_once_every_partition_is() -> None:
    """Otherwise a rolling restart would answer 503 for a moment. One that stays down delays the others only."""
    producer = FakeProducer(partitions=4)
    producer.publishers[1].down("not connected yet")
    producer.api.tick(0)
    assert readiness(producer) == (503, "partition 1: no broker: not connected yet")
    producer.api.end_start()
    assert readiness(producer)[0] == 200


def test_the_only_partition_that_is_down_is_503_without_number() -> None:
    producer = FakeProducer()
    producer.api.tick(0)
    producer.publishers[0].down("cut")
    assert readiness(producer) == (503, "no broker: cut")


def test_the_largest_batch_is_within_the_bound_on_memory() -> None:
    """With MAX_BODY_BYTES of 64 MiB, a batch above 32 MiB was always 503, though nothing else was there."""
    for mib in (8, 64):
        settings = ProducerSettings(max_body_bytes=mib << 20)
        assert limits_of(settings, 100).buffered_bytes > PARSED_FACTOR * settings.max_body_bytes
