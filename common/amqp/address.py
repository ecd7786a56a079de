"""Where the broker is: an AMQP URL, for logs without its secrets. Pure."""

from __future__ import annotations

from urllib.parse import quote, unquote, urlsplit


def masked_url(url: str) -> str:
    """The URL without its password and query, for logs."""
    parts = urlsplit(url)
    user = f"{quote(unquote(parts.username))}:***@" if parts.username else ""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{user}{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
