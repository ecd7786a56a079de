"""The broker's address: an AMQP URL that may name several hosts. Pure.

The form is that of RabbitMQ's URI specification, with a list of hosts as in PostgreSQL's libpq and in MongoDB:
`amqp://user:password@a:5672,b:5672/vhost?heartbeat=10`. No error repeats a part of the URL, because a password with a
raw `/` or `@` makes other parts look like hosts.
"""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, unquote

_PORTS = {"amqp": 5672, "amqps": 5671}
_EXAMPLE = "amqp://user:password@host:5672/vhost (or amqps://; several hosts: @a:5672,b:5672/)"
_MOST_HOSTS = 64
_VHOST_CHARS_MOST = 127  # of the domain `path` (AMQP 0-9-1, 1.2); pamqp enforces it
_HEARTBEAT_SECONDS = range(1, 0xFFFF)  # aiormq takes another value for 0, with which a frozen broker is never noticed


class AddressError(ValueError):
    """A fault in an AMQP URL. Its text completes a sentence that begins with the name of the setting."""


@dataclass(frozen=True, slots=True)
class Address:
    """A broker, or the nodes of a cluster. `userinfo`, `vhost` and `query` are as written, percent-encoded."""

    scheme: str
    userinfo: str
    hosts: tuple[tuple[str, int], ...]
    vhost: str
    query: str

    @property
    def shown(self) -> str:
        """The URL for logs, without password and query."""
        user = unquote(self.userinfo.partition(":")[0])
        hosts = ",".join(f"{_bracketed(host)}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{f'{quote(user)}:***@' if user else ''}{hosts}/{self.vhost}"

    def only(self, host: str, port: int) -> Address:
        """Return the same address with one host."""
        return replace(self, hosts=((host, port),))

    @property
    def url(self) -> str:
        """The URL. aiormq takes it if it has one host."""
        user = f"{self.userinfo}@" if self.userinfo else ""
        user = user.replace("[", "%5B").replace("]", "%5D")  # yarl would take them for those of an IPv6 address
        hosts = ",".join(f"{_bracketed(host)}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{user}{hosts}/{self.vhost}{f'?{self.query}' if self.query else ''}"


def parse_address(url: str) -> Address:
    """Parse an AMQP URL. Raise AddressError if it is none, or could be read in two ways."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _PORTS:
        raise AddressError(f"must look like {_EXAMPLE}")
    if any(character <= " " or character == "\x7f" for character in url):
        raise AddressError("has white space or a control character in it: percent-encode it")
    rest, has_fragment, _ = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, _, vhost = rest.partition("/")
    if has_fragment or "@" in vhost or "@" in query:
        raise AddressError("has a /, ?, # or @ where none may be: in a user or password, percent-encode it (/ is %2F)")
    userinfo, _, hosts = authority.rpartition("@")
    if "@" in userinfo and "," in userinfo:
        raise AddressError("has an @ before a comma: user and password stand once, before all hosts (%40 is an @)")
    decoded = unquote(vhost)
    if len(decoded) > _VHOST_CHARS_MOST or len(decoded.encode("utf-8", "surrogateescape")) > 255:
        raise AddressError(f"has a vhost of more than {_VHOST_CHARS_MOST} characters")
    names = hosts.split(",")
    if len(names) > _MOST_HOSTS:
        raise AddressError(f"names more than {_MOST_HOSTS} hosts")
    _check_query(query)
    scheme = scheme.lower()
    return Address(scheme, userinfo, tuple(_host(name, _PORTS[scheme]) for name in names), vhost, query)


def masked_url(url: str) -> str:
    """Return a valid URL without its password and query, for logs."""
    return parse_address(url).shown


def check_host(host: str) -> None:
    """Raise AddressError unless `host` is a host name or an IP address, without a port."""
    try:
        host.encode("idna")
        if ":" in host or any(character in "@/?#[] \t\r\n," for character in host):
            ipaddress.IPv6Address(host)
    except ValueError:  # UnicodeError is one
        raise AddressError("must be a host name or address, without a port") from None


def _host(text: str, default_port: int) -> tuple[str, int]:
    """Return host and port of one item of the list. Raise AddressError."""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or port[:1] not in ("", ":"):
            raise AddressError("has an IPv6 address whose brackets do not match: write [::1]:5672")
        port = port[1:] if port else str(default_port)
    elif text.count(":") > 1:
        raise AddressError("has an IPv6 address without brackets, which could hold a port or not: write [::1]:5672")
    else:
        host, colon, port = text.partition(":")
        port = port if colon else str(default_port)
    if not host:
        raise AddressError(f"has a host that is empty; it must look like {_EXAMPLE}")
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise AddressError("has a port that is not a number from 1 to 65535")
    try:
        check_host(host)
    except AddressError:
        raise AddressError("has a host that is neither a host name nor an address") from None
    return host, int(port)


def _check_query(query: str) -> None:
    """Raise AddressError for parameters with which every attempt of aiormq to connect would raise ValueError."""
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in ("heartbeat", "timeout") and not (value.isascii() and value.isdigit()):
            raise AddressError(f"has a {name} that is not a whole number of seconds")
        if name == "heartbeat" and int(value[:6]) not in _HEARTBEAT_SECONDS:
            raise AddressError("has a heartbeat that is not 1 to 65534 seconds: a frozen broker would not be noticed")
        if name == "auth" and value.lower() not in ("plain", "external"):
            raise AddressError("has an auth other than plain and external")
        if name == "cadata":
            try:
                base64.b64decode(value, validate=True)
            except ValueError:
                raise AddressError("has a cadata that is not base64") from None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
