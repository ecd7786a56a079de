"""Bearer tokens (RFC 6750 section 2.1) with the names of their owners. Pure."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from typing import NamedTuple

_NAMED = re.compile(r"([A-Za-z0-9_.\-]{1,32}):(.*)")
_TOKEN = re.compile(r"(?![A-Za-z0-9_.\-]{1,32}:$)[!-~]+")  # a name alone is no token


class Token(NamedTuple):
    """A token: the name of its owner, and the credentials that it accepts."""

    name: str
    credentials: tuple[bytes, ...]


def parse_tokens(text: str) -> list[Token]:
    """Return the tokens of an API_TOKEN value: `name:token` or `token`, separated by commas; none if it is empty.

    A token without a name is called token-1, token-2 and so on, by its place. `name:token` is also accepted as a whole,
    since 1.0 had no names. Raise ValueError with words that follow API_TOKEN and hold no part of it.
    """
    tokens = []
    for place, item in enumerate(filter(None, text.split(",")), 1):
        if not _TOKEN.fullmatch(item):
            raise ValueError(f"must be token or name:token in visible ASCII, but item {place} is neither")
        named = _NAMED.fullmatch(item)
        if named is None:
            tokens.append(Token(f"token-{place}", (item.encode(),)))
        else:
            tokens.append(Token(named[1], (named[2].encode(), item.encode())))
    if text and not tokens:
        raise ValueError("has commas, but no token: set one, or leave it empty")
    return tokens


def owner_of(authorization: bytes, tokens: Sequence[Token]) -> str | None:
    """Return the owner of an Authorization value's token, or None. Every token is compared, each in constant time."""
    if authorization[:7].lower() != b"bearer ":
        return None
    given = authorization[7:].strip()
    accepted = ((token.name, credential) for token in tokens for credential in token.credentials)
    owners = [name for name, credential in accepted if hmac.compare_digest(given, credential)]
    return owners[0] if owners else None
