"""AMQP URLs with one host or several. Nothing of a bad one is ever shown."""

import asyncio

import aiormq
import pytest
from aiormq.auth import AuthMechanism
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.frame import marshal

from common.amqp.address import AddressError, masked_url, parse_address


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("amqp://h", [("h", 5672)]),
        ("amqps://h/", [("h", 5671)]),
        ("AMQP://u:p@a:5672,b:5673,c:5674/vhost", [("a", 5672), ("b", 5673), ("c", 5674)]),
        ("amqp://u:p@a,b,c", [("a", 5672), ("b", 5672), ("c", 5672)]),
        ("amqp://[::1]:1,[fe80::2],10.0.0.1:2/%2F", [("::1", 1), ("fe80::2", 5672), ("10.0.0.1", 2)]),
        ("amqp://u:p@ss@h:1/", [("h", 1)]),
        ("amqp://h/a/b?heartbeat=5&cafile=/etc/ca.pem", [("h", 5672)]),
    ],
)
def test_every_host_of_a_url_is_found(url: str, hosts: list[tuple[str, int]]) -> None:
    assert list(parse_address(url).hosts) == hosts


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:20/secret@host/",
        "amqp://u:secret/x@host/",
        "amqp://u:p1@h1/,amqp://u:secret@h2/",
        "amqp://u:se?secret@h/",
        "amqp://u:se#secret@h/",
        "amqp:/u:secret@h",
        "amqp://u:secret@h:x/",
        "amqp://u:secret@h:0/",
        "amqp://u:secret@h:65536/",
        "amqp://u:secret@h:+5/",
        "amqp://u:secret@::1/",
        "amqp://u:secret@2001:db8::1:5672/",
        "amqp://u:secret@[::1/",
        "amqp://u:secret@[::1]5672/",
        "amqp://u:secret@a,,b/",
        "amqp://u:secret@/",
        "amqp://u:secret@a:1,b:2,/",
        "amqp://u:secret@a..b/",
        "amqp://u:secret@a b/",
        "http://u:secret@h/",
        "u:secret@h:5672",
        "amqp://u:secret@h/?heartbeat=soon",
        "amqp://u:secret@h/?heartbeat=0",
        "amqp://u:secret@h/?heartbeat=65535",
        "amqp://u:secret@h/?auth=magic",
        "amqp://u:secret@" + ",".join(["h"] * 65),
        "amqp://u:secret@h1,u:secret@h2/",
        "amqp://u:p@h/secret" + "x" * 122,
        "amqp://u:p@h/secret" + "%F0%9F%90%87" * 64,
    ],
)
def test_what_is_not_a_url_is_refused_without_its_text(url: str) -> None:
    with pytest.raises(AddressError) as refusal:
        parse_address(url)
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_one_host_at_a_time_is_a_url_for_aiormq() -> None:
    """Each candidate keeps the credentials, the vhost and the query."""
    address = parse_address("amqps://u:p%2F@a:1,[::1]:2/v?cafile=x")
    urls = [address.only(host, port).url for host, port in address.hosts]
    assert urls == ["amqps://u:p%2F@a:1/v?cafile=x", "amqps://u:p%2F@[::1]:2/v?cafile=x"]


@given(
    st.text(alphabet="aé:@,[]1=%.&F_-+~€", max_size=20),
    st.sampled_from(["h", "127.0.0.1", "[::1]:5", "h_x", "a:1,b:2"]),
    st.text(alphabet="aé:,/[]1=%.&2F_-+~€", max_size=20),
    st.sampled_from(["", "?heartbeat=5", "?timeout=3", "?name=x", "?auth=external", "?cafile=é"]),
)
def test_what_is_accepted_never_fails_in_aiormq(user: str, hosts: str, vhost: str, query: str) -> None:
    """Otherwise there would be a traceback at every attempt to connect."""
    try:
        address = parse_address(f"amqp://{user}@{hosts}/{vhost}{query}")
    except AddressError:
        return
    loop = asyncio.new_event_loop()
    for host, port in address.hosts:
        connection = aiormq.Connection(address.only(host, port).url, loop=loop)
        assert (connection.url.host, connection.url.port) == (host, port)
        marshal(commands.Connection.Open(virtual_host=connection.vhost), 0)
        AuthMechanism.PLAIN.value(connection).marshal()
    loop.close()


def test_logs_show_hosts_and_user_and_no_secret() -> None:
    assert masked_url("amqp://us%20er:secret@a,b:2/v?cadata=AAAA") == "amqp://us%20er:***@a:5672,b:2/v"
    assert masked_url("amqp://h/") == "amqp://h:5672/"


@given(st.text(alphabet="amqp://u:@s,h[]1?#=%. ", max_size=40))
def test_any_text_is_an_address_or_one_refusal(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert address.hosts
    assert parse_address(address.url) == address
