"""The configuration of the broker in deploy/compose, on this RabbitMQ: its user has just the rights that it needs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiormq
import pytest
import yaml  # type: ignore[import-untyped]
from aiormq.abc import AbstractChannel

from tests.conftest import ROOT, Start
from tests.rabbitmq import RabbitMQ
from tests.support.polling import wait_until
from tests.support.producer import an_event

COMPOSE = ROOT / "deploy" / "compose"


@pytest.fixture(scope="module")
def secrets() -> Iterator[Path]:
    """The folder that make-secrets made, for one broker."""
    with tempfile.TemporaryDirectory(prefix="predlog-") as name:
        program = shutil.copy(COMPOSE / "make-secrets", name)
        subprocess.run([program, "rabbitmq:5672"], check=True, capture_output=True)
        yield Path(name) / "secrets"


@pytest.fixture(scope="module")
def shipped_broker(secrets: Path) -> Iterator[RabbitMQ]:
    """A RabbitMQ with the files that compose.yaml and secrets.yaml mount. Its URL has the user of predlog."""
    with tempfile.TemporaryDirectory(prefix="predlog-") as name:
        node = RabbitMQ(Path(name))
        conf = node.directory / "conf.d"
        conf.mkdir()
        shutil.copy(secrets / "rabbitmq-user.conf", conf / "30-user.conf")
        shutil.copy(COMPOSE / "advanced.config", node.directory)
        node.start()
        node.url = (secrets / "amqp_url").read_text().strip().replace("rabbitmq:5672", f"127.0.0.1:{node.port}")
        yield node
        node.kill()
        node.stop()


def test_every_broker_version_starts_and_knows_the_timeout(shipped_broker: RabbitMQ) -> None:
    """4.3 acts on it. Older ones do not know it, and as a line of rabbitmq.conf it would keep them from starting."""
    said = shipped_broker.eval("application:get_env(rabbit, consumer_disconnected_timeout)")
    assert said == "{ok, 1000}"


@pytest.mark.parametrize("partitions", [1, 2])
def test_the_shipped_user_may_do_all_that_predlog_does(
    shipped_broker: RabbitMQ, producer: Start, consumer: Start, partitions: int
) -> None:
    settings = {"AMQP_URL": shipped_broker.url, "QUEUE_NAME": "predictions", "PARTITIONS": partitions}
    service, stored = producer(**settings), consumer(**settings)
    body = json.dumps(an_event("camera-7", preds=3)).encode()
    request = urllib.request.Request(f"{service.url}/process", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200
    wait_until("its rows are stored", lambda: stored.metric("predlog_rows_total") == 3, explain=stored.log)


async def test_the_shipped_user_may_do_nothing_else(shipped_broker: RabbitMQ) -> None:
    connection = await aiormq.connect(shipped_broker.url)
    calls: tuple[Callable[[AbstractChannel], Awaitable[object]], ...] = (
        lambda channel: channel.queue_declare("others"),
        lambda channel: channel.queue_declare("predictionsx"),
        lambda channel: channel.exchange_declare("predictions-2"),
        lambda channel: channel.basic_publish(b"", exchange="amq.fanout", routing_key="x"),
    )
    for refused in calls:
        channel = await connection.channel()
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await refused(channel)
    await connection.close()
    [line] = [line for line in shipped_broker.ctl("list_users").splitlines() if line.startswith("predlog")]
    assert line.split() == ["predlog", "[monitoring]"]


def test_compose_and_kubernetes_set_the_same_rights() -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "broker.yaml").read_text())
    texts = manifest["spec"]["rabbitmq"]["advancedConfig"], (COMPOSE / "advanced.config").read_text()
    [kubernetes, compose] = [re.findall(r'<<".+">>.+', text) for text in texts]
    assert kubernetes == compose
    assert len(compose) == 3


def test_secrets_are_random_and_closed_to_other_users(secrets: Path) -> None:
    password = re.fullmatch(r"amqp://predlog:([0-9a-f]{48})@rabbitmq:5672/\n", (secrets / "amqp_url").read_text())
    assert password is not None
    assert (secrets / "rabbitmq-user.conf").read_text().endswith(f"default_pass = {password[1]}\n")
    assert len({password[1], (secrets / "api_token").read_text(), (secrets.parent / ".env").read_text()[-49:-1]}) == 3
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert (secrets.parent / ".env").stat().st_mode & 0o777 == 0o600
