"""A TLS 1.3 client that writes handshake messages of its own, as a hostile one can. OpenSSL has no call for that."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

APPLICATION_DATA, HANDSHAKE = 23, 22  # content types (RFC 8446, B.1)
KEY_UPDATE = b"\x18\x00\x00\x01\x01"  # which asks for one of the server's (4.6.3)


def expand_label(secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label without a context (RFC 8446, 7.1)."""
    name = b"tls13 " + label
    info = length.to_bytes(2) + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(SHA384(), length, info).derive(secret)


class Keys:
    """The keys by which a client encrypts, with AES-256-GCM, from the file that OpenSSL logs them to."""

    def __init__(self, log: Path) -> None:
        lines = log.read_text().splitlines()
        [secret] = [line.split()[2] for line in lines if line.startswith("CLIENT_TRAFFIC_SECRET_0")]
        self._begin(bytes.fromhex(secret))

    def _begin(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = AESGCM(expand_label(secret, b"key", 32))
        self._iv = int.from_bytes(expand_label(secret, b"iv", 12))
        self._records = 0

    def record(self, content: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """Return an encrypted record (RFC 8446, 5.2)."""
        head = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2)
        nonce = (self._iv ^ self._records).to_bytes(12)
        self._records += 1
        return head + self._aead.encrypt(nonce, content + bytes([kind]), head)

    def key_update(self) -> bytes:
        """Return a record that changes the keys of later ones."""
        record = self.record(KEY_UPDATE, HANDSHAKE)
        self._begin(expand_label(self._secret, b"traffic upd", 48))
        return record


class HandmadeClient(Keys):
    """A client whose handshake is over, and whose records are made here."""

    def __init__(self, port: int, folder: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.keylog_filename = str(folder / "keys")
        tls = context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10))
        cipher = tls.cipher()
        assert cipher is not None
        assert cipher[0] == "TLS_AES_256_GCM_SHA384"
        super().__init__(folder / "keys")
        self.socket = socket.socket(fileno=tls.detach())
        self.socket.settimeout(10)
