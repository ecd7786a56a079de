"""A real nginx in front of servers, with its defaults: it buffers requests, and takes a failing server out for 10 s."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.rabbitmq import free_port
from tests.support.polling import wait_until

PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")

_CONFIGURATION = """
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log info;
events {{ worker_connections 1024; }}
http {{
    access_log {directory}/access.log;
    client_max_body_size 0;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream producers {{ {servers} {keepalive} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://producers;
            {headers}
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(directory: Path, urls: list[str], keep_alive: bool) -> Iterator[str]:
    """The URL of an nginx in front of `urls`; `keep_alive` is for its connections to them."""
    assert PROGRAM is not None
    directory.mkdir()
    port = free_port()
    (directory / "nginx.conf").write_text(
        _CONFIGURATION.format(
            directory=directory,
            user="user root;" if os.geteuid() == 0 else "",  # no other user can read the test's folder
            port=port,
            servers=" ".join(f"server {url.removeprefix('http://')};" for url in urls),
            keepalive="keepalive 32;" if keep_alive else "",
            headers='proxy_http_version 1.1; proxy_set_header Connection "";' if keep_alive else "",
        )
    )
    command = [PROGRAM, "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(directory / "nginx.conf")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_until("nginx runs", (directory / "nginx.pid").exists)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def take_out(directory: Path, url: str) -> None:
    """Make the nginx of `directory` send nothing more to the server at `url`."""
    configuration, master = directory / "nginx.conf", int((directory / "nginx.pid").read_text())
    server = f"server {url.removeprefix('http://')}"
    configuration.write_text(configuration.read_text().replace(f"{server};", f"{server} down;"))
    old = _workers(master)
    os.kill(master, signal.SIGHUP)
    wait_until("its old worker is gone, and a new one is there", lambda: (new := _workers(master)) and not new & old)


def _workers(master: int) -> set[str]:
    return set(Path(f"/proc/{master}/task/{master}/children").read_text().split())
