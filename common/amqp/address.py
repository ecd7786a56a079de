"""The broker's address: an AMQP URL that may name several hosts. Pure.

The form is that of RabbitMQ's URI specification, with a list of hosts as in PostgreSQL's libpq and in MongoDB:
`amqp://user:password@a:5672,b:5672/vhost?heartbeat=10`. No error repeats a part of the URL, because a password with a
raw `/` or `@` makes other parts look like hosts.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, quote, unquote

_PORTS = {"amqp": 5672, "amqps": 5671}
_EXAMPLE = "amqp://user:password@host:5672/vhost (or amqps://; several hosts: @a:5672,[::1]:5672/)"
_MOST_HOSTS = 64
_VHOST_CHARS_MOST = 127  # of the domain `path` (AMQP 0-9-1, 1.2); pamqp enforces it
_HOST = re.compile(r"(?:[a-zA-Z0-9_-]{1,63}(?:\.|$))+")
_HOST_AND_PORT = re.compile(r"(?:\[([^]]+)\]|([^]:[]+))(?::(\d{1,5}))?", re.ASCII)
_PARAMETERS = {  # with other values, every attempt of aiormq to connect would raise ValueError
    "heartbeat": ("[1-9][0-9]{0,3}", "1 to 9999 seconds"),  # 0: a frozen broker would never be noticed
    "timeout": ("[0-9]{1,9}", "a whole number of seconds"),
    "auth": ("(?i:plain|external)", "plain or external"),
}


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
        user = quote(unquote(self.userinfo.partition(":")[0]))
        return replace(self, userinfo=f"{user}:***" if user else "", query="").url

    def only(self, host: str, port: int) -> Address:
        """Return the same address with one host."""
        return replace(self, hosts=((host, port),))

    @property
    def url(self) -> str:
        """The URL. aiormq accepts it if it has one host."""
        user = f"{self.userinfo}@" if self.userinfo else ""
        user = user.replace("[", "%5B").replace("]", "%5D")  # yarl would take them for those of an IPv6 address
        hosts = ",".join(f"{_bracketed(host)}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{user}{hosts}/{self.vhost}{f'?{self.query}' if self.query else ''}"


def parse_address(url: str) -> Address:
    """Parse an AMQP URL. Raise AddressError if it is not one, or is ambiguous."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _PORTS or any(character <= " " or character == "\x7f" for character in url):
        raise AddressError(f"must look like {_EXAMPLE}")
    rest, has_fragment, _ = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, _, vhost = rest.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    if has_fragment or "@" in vhost or "@" in query or ("@" in userinfo and "," in userinfo):
        raise AddressError("has a misplaced /, ?, # or @: in user and password, percent-encode it (/ is %2F)")
    decoded = unquote(vhost)
    if len(decoded) > _VHOST_CHARS_MOST or len(decoded.encode("utf-8", "surrogateescape")) > 255:
        raise AddressError(f"has a vhost of more than {_VHOST_CHARS_MOST} characters")
    names = hosts.split(",")
    if len(names) > _MOST_HOSTS:
        raise AddressError(f"names more than {_MOST_HOSTS} hosts")
    for name, value in parse_qsl(query, keep_blank_values=True):
        form, wanted = _PARAMETERS.get(name, ("(?s:.*)", ""))
        if not re.fullmatch(form, value):
            raise AddressError(f"has a {name} that is not {wanted}")
    return Address(scheme, userinfo, tuple(_host(name, _PORTS[scheme]) for name in names), vhost, query)


def masked_url(url: str) -> str:
    """Return a valid URL without its password and query, for logs."""
    return parse_address(url).shown


def is_host(text: str) -> bool:
    """Return whether `text` is a host name in ASCII or an IP address, without brackets and port."""
    if ":" not in text:
        return _HOST.fullmatch(text) is not None
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _host(text: str, default_port: int) -> tuple[str, int]:
    """Return host and port of one item of the list. Raise AddressError."""
    found = _HOST_AND_PORT.fullmatch(text)
    host, port = (found[1] or found[2], int(found[3] or default_port)) if found else ("", 0)
    if not is_host(host) or not 1 <= port <= 65535:
        raise AddressError(f"has an invalid host or port; it must look like {_EXAMPLE}")
    return host, port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
