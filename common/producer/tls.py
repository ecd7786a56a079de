"""The producer's certificate."""

from __future__ import annotations

import ssl

from common.config import ProducerSettings
from common.errors import StartupError


def no_passphrase() -> str:
    raise OSError("the key has a passphrase, and nobody to ask for it: store it without one")


def tls_context(settings: ProducerSettings) -> ssl.SSLContext | None:
    """The TLS context; raises StartupError. TLS 1.2 and 1.3 with Python's default ciphers."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, no_passphrase)
    except OSError as error:  # ssl.SSLError is one
        raise StartupError(
            f"cannot use TLS_CERT {settings.tls_cert} with TLS_KEY {settings.tls_key}: {error}"
        ) from None
    return context
