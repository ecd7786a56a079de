"""The image's health check: exit code 0 while the producer or the consumer in this container is alive.

It asks for liveness (/healthz) and not for readiness (/readyz): a standby, and a process whose broker is away, are
healthy and must not be restarted. Whether to send traffic is for a load balancer to ask.
"""

import http.client
import os
import ssl
import sys

TIMEOUT_SECONDS = 4.0  # shorter than that of HEALTHCHECK in the Dockerfile


def is_alive(port: int, tls: bool) -> bool:
    """Return whether an HTTP server answers on this port. Any status will do: even a refusal needs a live loop."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    if tls:  # it is our own, whatever name is in its certificate
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS, context=context)
    try:
        connection.request("GET", "/healthz")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def main() -> int:
    """Return 0 if the health port answers or, where that is off, the producer's main port."""
    alive = is_alive(int(os.environ.get("HEALTH_PORT") or 8001), tls=False)
    alive = alive or is_alive(int(os.environ.get("HTTP_PORT") or 8000), tls=bool(os.environ.get("TLS_CERT")))
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
