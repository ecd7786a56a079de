"""HTTPS, and a certificate that is replaced while the producer runs."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import time
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization

from tests.conftest import Service, Start
from tests.integration.test_contract import EVENT
from tests.support.polling import wait_until


def issue(authority: trustme.CA, folder: Path) -> None:
    made = authority.issue_cert("127.0.0.1")
    folder.mkdir(exist_ok=True)
    made.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))


def ask(
    service: Service, authority: trustme.CA, method: str = "GET", path: str = "/readyz", body: bytes | None = None
) -> tuple[int, bytes]:
    """Return status, and the serial number of the certificate that was shown."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    port = int(service.url.rpartition(":")[2])
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    try:
        connection.request(method, path, body)
        assert isinstance(connection.sock, ssl.SSLSocket)
        serial = str((connection.sock.getpeercert() or {})["serialNumber"]).encode()
        return connection.getresponse().status, serial
    finally:
        connection.close()


def test_sighup_loads_a_new_certificate_and_keeps_a_good_one(producer: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    issue(authority, tmp_path)
    service = producer(wait=False, TLS_CERT=tmp_path / "cert.pem", TLS_KEY=tmp_path / "key.pem")
    deadline = time.monotonic() + 20

    def serial() -> bytes:
        while True:
            try:
                status, shown = ask(service, authority)
                if status == 200:
                    return shown
            except ConnectionError:
                pass
            assert time.monotonic() < deadline, service.log()
            time.sleep(0.05)

    def hang_up(word: str) -> None:
        before = service.log().count(word)
        service.process.send_signal(signal.SIGHUP)
        wait_until(f"the log says {word!r} again", lambda: service.log().count(word) > before, explain=service.log)

    first = serial()
    assert ask(service, authority, "POST", "/process", json.dumps(EVENT).encode())[0] == 200
    issue(authority, tmp_path)
    hang_up("reloaded")
    second = serial()
    assert second != first
    (tmp_path / "cert.pem").write_text("broken")
    hang_up("the old one stays")
    assert serial() == second
    issue(trustme.CA(), tmp_path / "other")
    (tmp_path / "cert.pem").write_bytes((tmp_path / "other" / "cert.pem").read_bytes())  # the key comes a moment later
    hang_up("the old one stays")
    assert serial() == second


def test_tls_clients_that_leave_early_fill_no_log(producer: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    issue(authority, tmp_path)
    service = producer(wait=False, TLS_CERT=tmp_path / "cert.pem", TLS_KEY=tmp_path / "key.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    wait_until("it serves", lambda: "connected to" in service.log() and "POST to" in service.log(), explain=service.log)
    said = service.log().count("\n")
    body = json.dumps(EVENT).encode()
    for _ in range(5):
        with (
            socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), 10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as client,
        ):
            client.sendall(b"POST /process HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert ask(service, authority, "POST", "/process", body)[0] == 200
    assert service.log().count("\n") == said


def test_a_key_with_a_passphrase_is_one_clear_line(producer: Start, tmp_path: Path) -> None:
    issue(trustme.CA(), tmp_path)
    key = serialization.load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "key.pem").write_bytes(locked)
    service = producer(wait=False, TLS_CERT=tmp_path / "cert.pem", TLS_KEY=tmp_path / "key.pem")
    assert service.process.wait(20) == 1
    assert "has a passphrase" in service.log().splitlines()[-1]


def test_a_certificate_that_cannot_be_used_is_one_clear_line(producer: Start, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("broken")
    for workers in (1, 2):
        service = producer(wait=False, TLS_CERT=tmp_path / "cert.pem", TLS_KEY=tmp_path / "none.pem", WORKERS=workers)
        assert service.process.wait(20) == 1
        assert "TLS_CERT" in service.log().splitlines()[-1]
        assert "Traceback" not in service.log()
