"""The node for tests does what it says: only then can a test of trouble be believed."""

import pytest

from scripts.rabbitmq import BrokerError, speaks_amqp
from tests.rabbitmq import RabbitMQ


def test_a_paused_node_is_silent_and_continues_when_resumed(broker: RabbitMQ) -> None:
    broker.pause()
    try:
        assert not speaks_amqp(broker.port, timeout_seconds=0.3)
    finally:
        broker.resume()
    assert speaks_amqp(broker.port, timeout_seconds=10)


def test_rabbitmqctl_and_expressions_reach_this_node(broker: RabbitMQ) -> None:
    assert broker.process is not None
    pid = f'"{broker.process.pid}"'
    assert broker.ctl("eval", "os:getpid().").strip() == pid
    assert broker.eval("os:getpid()") == pid


@pytest.mark.parametrize("expression", ["error(bad)", "{ok, _} = {error, bad}", "(bad"])
def test_an_expression_without_a_value_is_an_error(broker: RabbitMQ, expression: str) -> None:
    with pytest.raises(BrokerError, match="bad"):
        broker.eval(expression)
