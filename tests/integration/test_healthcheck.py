"""The image's health check, against live processes in every state that they can be in."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import trustme

from tests.conftest import ROOT, Service, Start
from tests.support.polling import wait_until


def is_healthy(service: Service, **environment: object) -> bool:
    port = service.url.rpartition(":")[2]
    variable = {"producer": "HTTP_PORT", "consumer": "HEALTH_PORT"}[service.name]
    settings = {"HTTP_PORT": "1", "HEALTH_PORT": "1", variable: port, **environment}  # nobody listens on port 1
    command = [sys.executable, str(ROOT / "deploy" / "compose" / "healthcheck.py")]
    return subprocess.run(command, env={k: str(v) for k, v in settings.items()}, timeout=30).returncode == 0


def readiness(service: Service) -> int:
    try:
        with urllib.request.urlopen(f"{service.url}/readyz", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_broker_outage_and_a_standby_are_healthy(producer: Start, consumer: Start, nobodys_port: int) -> None:
    outage = f"amqp://guest:guest@127.0.0.1:{nobodys_port}/"
    without_broker = producer(wait=False, AMQP_URL=outage)
    consumer()
    standby = consumer(wait=False)
    for service in (without_broker, standby):
        wait_until_it_listens(service)
        assert readiness(service) == 503
        assert is_healthy(service)


def test_a_process_that_is_gone_or_frozen_is_not_healthy(producer: Start) -> None:
    service = producer()
    assert is_healthy(service)
    os.kill(service.process.pid, signal.SIGSTOP)
    assert not is_healthy(service)
    os.kill(service.process.pid, signal.SIGCONT)
    service.kill()
    assert not is_healthy(service)


def test_a_producer_with_tls_is_healthy(producer: Start, tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("camera.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    pem = tmp_path / "server.pem"
    service = producer(wait=False, TLS_CERT=pem, TLS_KEY=pem)
    wait_until_it_listens(service, TLS_CERT=pem)
    assert is_healthy(service, TLS_CERT=pem)


def wait_until_it_listens(service: Service, **environment: object) -> None:
    wait_until("it is healthy", lambda: is_healthy(service, **environment), explain=service.log)
