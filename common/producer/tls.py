"""The producer's certificate, and how it is replaced while it serves."""

from __future__ import annotations

import logging
import ssl

from common.errors import StartupError

log = logging.getLogger("predlog.producer")


class Certificate:
    """A certificate chain with its key, in a TLS context for servers. TLS 1.2 and 1.3 with Python's default ciphers."""

    def __init__(self, cert_file: str, key_file: str) -> None:
        """Load both files. Raise StartupError."""
        self._cert_file = cert_file
        self._key_file = key_file
        self.context = self._load()

    def reload(self) -> None:
        """Load both files again for new connections. If they cannot be used, log that and keep the old ones."""
        try:
            self._load()  # into another context first, as OpenSSL replaces a certificate before it checks the key
            self.context.load_cert_chain(self._cert_file, self._key_file, _no_passphrase)
            log.info("TLS certificate reloaded")
        except (OSError, StartupError) as error:
            log.error("%s; the old one stays", error)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert_file, self._key_file, _no_passphrase)
        except OSError as error:  # ssl.SSLError is one
            raise StartupError(
                f"cannot use TLS_CERT {self._cert_file} with TLS_KEY {self._key_file}: {error}"
            ) from None
        return context


def _no_passphrase() -> str:
    raise OSError("the key has a passphrase; store it without one")
