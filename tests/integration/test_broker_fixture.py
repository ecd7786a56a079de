"""The node for tests does what it says: only then can a test of trouble be believed."""

from scripts.rabbitmq import speaks_amqp
from tests.rabbitmq import RabbitMQ


def test_a_paused_node_is_silent_and_continues_when_resumed(broker: RabbitMQ) -> None:
    broker.pause()
    try:
        assert not speaks_amqp(broker.port, timeout_seconds=0.3)
    finally:
        broker.resume()
    assert speaks_amqp(broker.port, timeout_seconds=10)


def test_rabbitmqctl_and_signals_reach_this_node(broker: RabbitMQ) -> None:
    assert broker.process is not None
    assert broker.ctl("eval", "os:getpid().").strip() == f'"{broker.process.pid}"'
