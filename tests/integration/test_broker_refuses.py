"""A broker that refuses events, or some of them: the producer reports why at once, and accepts events when it can.

These are real processes and a real RabbitMQ.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from zlib import crc32

import aiormq
import pytest

from tests.conftest import Service, Start
from tests.integration.test_contract import EVENT, call
from tests.rabbitmq import RabbitMQ
from tests.support.polling import wait_until


def post(service: Service, device_id: str = "camera-7") -> tuple[int, str]:
    """Return status and detail of the answer to one event."""
    status, _, answer = call(service, "POST", "/process", json.dumps(EVENT | {"device_id": device_id}).encode())
    return status, "" if status == 200 else str(answer["detail"])


def wait_for_stall(service: Service, device_id: str, words: str) -> None:
    """Post until /readyz reports the stall: only events show that a queue takes none."""

    def told() -> bool:
        post(service, device_id)
        return words in service.not_ready()

    wait_until(f"/readyz says {words!r}", told, 90, explain=service.log)


def limit(broker: RabbitMQ, queue_name: str) -> None:
    """A policy by which the queue takes no message beyond its first."""
    policy = {"vhost": "/", "name": queue_name, "pattern": f"^{re.escape(queue_name)}$", "apply-to": "queues"}
    broker.define(policies=[policy | {"definition": {"max-length": 1, "overflow": "reject-publish"}}])


def unlimit(broker: RabbitMQ, queue_name: str) -> None:
    """Remove the policy, and empty the queue."""
    assert broker.eval(f'rabbit_policy:delete(<<"/">>, <<"{queue_name}">>, <<"test">>)') == "ok"

    async def purge() -> None:
        async with aiormq.connect(broker.url) as connection:
            await (await connection.channel()).queue_purge(queue_name)

    asyncio.run(purge())


@pytest.fixture
def vhost(broker: RabbitMQ, queue_name: str) -> str:
    """A virtual host of the test's own, with a user of the same name who has every right in it."""
    broker.define(vhosts=[{"name": queue_name}])
    allow(broker, queue_name)
    may_write(broker, queue_name, True)
    return queue_name


def allow(broker: RabbitMQ, user: str, **limits: int) -> None:
    """Define the user with its limits; -1 is no limit."""
    broker.define(users=[{"name": user, "password": "secret", "tags": "", "limits": limits}])


def may_write(broker: RabbitMQ, vhost: str, yes: bool) -> None:
    rights = {"configure": ".*", "write": ".*" if yes else "^$", "read": ".*"}
    broker.define(permissions=[{"user": vhost, "vhost": vhost, **rights}])


def url_of(broker: RabbitMQ, vhost: str) -> str:
    return f"amqp://{vhost}:secret@127.0.0.1:{broker.port}/{vhost}"


def test_a_reject_publish_policy_comes_and_goes(broker: RabbitMQ, producer: Start, queue_name: str) -> None:
    """RabbitMQ 3.10 nacks forever on a channel that met the full queue, so the producer opens a new connection."""
    service = producer()
    limit(broker, queue_name)
    wait_for_stall(service, "camera-7", "nack")

    def is_stalled() -> bool:
        post(service)
        return service.metric("predlog_stalled") == 1

    wait_until("the metric shows it, too", is_stalled, explain=service.log)
    assert "nack" in service.log()
    unlimit(broker, queue_name)
    wait_until("an event is accepted", lambda: post(service)[0] == 200, explain=service.log)
    wait_until("it is ready", lambda: not service.not_ready())
    assert service.metric("predlog_stalled") == 0


def test_a_user_who_may_not_write_ends_the_start(broker: RabbitMQ, producer: Start, vhost: str) -> None:
    may_write(broker, vhost, False)
    service = producer(wait=False, AMQP_URL=url_of(broker, vhost))
    assert service.process.wait(20) == 1
    last = service.log().splitlines()[-1]
    assert "denies access" in last
    assert "amq.default" in last
    assert "Traceback" not in service.log()
    assert "secret" not in service.log()


def test_a_limit_on_connections_is_waited_for(broker: RabbitMQ, producer: Start, vhost: str) -> None:
    """The old process can hold the last one while the new one starts."""
    allow(broker, vhost, **{"max-connections": 0})
    service = producer(wait=False, AMQP_URL=url_of(broker, vhost))
    wait_until("/readyz says why", lambda: "connection limit" in service.not_ready(), explain=service.log)
    allow(broker, vhost, **{"max-connections": -1})
    wait_until("an event is accepted", lambda: post(service)[0] == 200, explain=service.log)


def test_a_limit_of_one_channel_is_enough(broker: RabbitMQ, producer: Start, vhost: str) -> None:
    allow(broker, vhost, **{"max-channels": 1})
    service = producer(AMQP_URL=url_of(broker, vhost))
    assert post(service)[0] == 200
    assert "WARNING" not in service.log()


def test_a_limit_on_queues_is_what_the_error_says(broker: RabbitMQ, producer: Start, vhost: str) -> None:
    limits = {"component": "vhost-limits", "name": "limits", "vhost": vhost}
    broker.define(parameters=[limits | {"value": {"max-queues": 0}}])
    service = producer(wait=False, AMQP_URL=url_of(broker, vhost))
    assert service.process.wait(20) == 1
    last = service.log().splitlines()[-1]
    assert "refuses to declare the queue" in last
    assert "limit" in last
    assert "other arguments" not in last


def test_a_right_that_is_revoked_is_reported_at_once(broker: RabbitMQ, producer: Start, vhost: str) -> None:
    """No event waits for its time-out, and /readyz stays 503 between the attempts to connect."""
    service = producer(AMQP_URL=url_of(broker, vhost), CONFIRM_TIMEOUT_MS=60_000)
    assert post(service)[0] == 200
    may_write(broker, vhost, False)

    def refused() -> bool:
        status, detail = post(service)
        assert "127.0.0.1" not in detail, "an address in a public answer"
        return status != 200

    # A channel caches the right until it has had nothing to do for a second or so, and hibernates.
    wait_until("an event is refused", refused, explain=service.log, poll_seconds=1.2)
    wait_until("/readyz says why", lambda: "denies access" in service.not_ready(), explain=service.log)
    until = time.monotonic() + 1  # some attempts to connect
    while time.monotonic() < until:
        assert "denies access" in service.not_ready()
        assert post(service)[0] == 503
    may_write(broker, vhost, True)
    wait_until("an event is accepted", lambda: post(service)[0] == 200, explain=service.log)


def test_a_connection_during_an_alarm_is_known_to_be_blocked(broker: RabbitMQ, producer: Start) -> None:
    """RabbitMQ tells only publishers of an alarm, so the first event would wait for its time-out."""
    with broker.memory_alarm():
        service = producer(wait=False, CONFIRM_TIMEOUT_MS=60_000)
        wait_until("it listens", lambda: "POST to" in service.log(), explain=service.log)
        wait_until("/readyz says why", lambda: "takes no messages" in service.not_ready(), explain=service.log)
        assert post(service)[0] == 503
    wait_until("an event is accepted", lambda: post(service)[0] == 200, explain=service.log)


def device_of(partition: int, partitions: int) -> str:
    return next(f"d{n}" for n in range(1000) if crc32(f"d{n}".encode()) % partitions == partition)


def test_a_full_partition_refuses_only_its_devices(broker: RabbitMQ, producer: Start, queue_name: str) -> None:
    service = producer(PARTITIONS=2)
    full, other = device_of(1, 2), device_of(0, 2)
    limit(broker, f"{queue_name}.1")
    wait_for_stall(service, full, "partition 1")
    assert [post(service, other)[0] for _ in range(50)] == [200] * 50
    unlimit(broker, f"{queue_name}.1")
    wait_until("it takes events again", lambda: post(service, full)[0] == 200, 45, explain=service.log)


def ra(broker: RabbitMQ, queue_name: str, what: str) -> None:
    """Stop or restart the only member of a quorum queue."""
    broker.eval(
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue_name}">>)), '
        f"{{Name, _}} = amqqueue:get_pid(Q), ra:{what}(quorum_queues, {{Name, node()}})"
    )


def test_a_partition_without_a_leader_refuses_only_its_devices(
    broker: RabbitMQ, producer: Start, queue_name: str
) -> None:
    """Its events are nacked or wait for a confirm in vain: soon they are refused at once, and no others wait.

    Nacks alone end its link, and the next is up until its first nack: the states are polled.
    """
    service = producer(PARTITIONS=2, CONFIRM_TIMEOUT_MS=8_000)
    lost, other = device_of(1, 2), device_of(0, 2)
    ra(broker, f"{queue_name}.1", "stop_server")
    wait_for_stall(service, lost, "partition 1")
    assert call(service, "GET", "/readyz")[0] == 200, "a load balancer would take it from the other devices, too"
    assert [post(service, other)[0] for _ in range(50)] == [200] * 50

    def refused_at_once() -> bool:
        assert post(service, lost)[0] in {503, 504}
        down = service.metric('predlog_partition_up{partition="1"}') == 0
        return down and service.metric('predlog_refusals_total{reason="partition_down"}') >= 1

    wait_until("its events are refused at once", refused_at_once, explain=service.log)
    ra(broker, f"{queue_name}.1", "restart_server")
    wait_until("it takes events again", lambda: post(service, lost)[0] == 200, 45, explain=service.log)


def test_every_character_of_a_queue_name_works(broker: RabbitMQ, producer: Start, queue_name: str) -> None:
    """What the settings allow is accepted by aiormq and by the broker, up to the longest name."""
    name = (queue_name + "-_.:@#,/+ zZ9").ljust(245, "x")
    service = producer(QUEUE_NAME=name)
    assert post(service)[0] == 200
