"""The clients in examples/, against a real producer, broker and consumer: every event is exactly one row."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from selenium import webdriver

from scripts.rabbitmq import free_port
from tests.browser.test_page import CHROMEDRIVER, CHROMIUM, FLAGS
from tests.conftest import ROOT, Service, Start
from tests.support.polling import wait_until

EXAMPLES = ROOT / "examples"
COUNT = 600
HOSTILE = {"tags": ['a,"b"', "猫"], "image_frame": "semi;colon\r\nand line end"}


def event(number: int, **changed: Any) -> dict[str, Any]:
    pred = {"image_frame": f"frame-{number}.jpg", "prob": 0.5, "tags": ["cat"], **changed}
    data = {"license_id": "L-1", "preds": [pred]}
    return {"device_id": "camera-7", "client_id": "shop-1", "created_at": f"#{number}", "data": data}


@pytest.fixture(scope="session")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the C client, compiled as its head says, with every warning an error."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed (Debian: apt-get install gcc libc6-dev)")
    program = tmp_path_factory.mktemp("c") / "predlog_client"
    headers = subprocess.run([compiler, "-E", "-"], input="#include <curl/curl.h>", text=True, capture_output=True)
    if headers.returncode != 0:
        pytest.skip("libcurl's headers are not installed (Debian: apt-get install libcurl4-openssl-dev)")
    source = EXAMPLES / "c" / "predlog_client.c"
    strict = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *strict, "-o", program, source, "-lcurl"], check=True)
    return [str(program)]


def find_node() -> list[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed (Debian: apt-get install nodejs)")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version[1:].partition(".")[0]) < 18:
        pytest.skip(f"Node.js {version.strip()} is older than 18")
    return [node]


@pytest.fixture(params=["python", "javascript", "c"])
def command(request: pytest.FixtureRequest) -> list[str]:
    """Each client's command, without its arguments."""
    if request.param == "python":
        return ["/usr/bin/env", "python3", str(EXAMPLES / "python" / "predlog_client.py")]
    if request.param == "javascript":
        return [*find_node(), str(EXAMPLES / "javascript" / "predlog_client.mjs")]
    return list(request.getfixturevalue("c_program"))


class Device:
    """A client as a process, with its spool and its output."""

    def __init__(self, command: list[str], url: str, directory: Path, token: str = "") -> None:
        self.spool, self._errors = directory / "spool", directory / "client.log"
        self._command, self._environment = [*command, url, str(self.spool)], {"PATH": os.environ["PATH"]}
        if token:
            self._environment["API_TOKEN"] = token
        self.start()

    def start(self) -> None:
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.PIPE, stdout=errors, stderr=errors
            )

    def put(self, *events: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(json.dumps(each) + "\n" for each in events).encode())
        self.process.stdin.flush()

    def finish(self) -> None:
        """End its input; wait until it has delivered everything."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0, self.log()
        assert [file.name for file in self.requests() if file.read_bytes()] == []

    def requests(self) -> list[Path]:
        return [file for file in self.spool.iterdir() if file.name != "refused"]

    def spooled(self) -> int:
        """The number of events in the spool that were not answered."""
        return sum(file.read_bytes().count(b"\n") for file in self.requests()) if self.spool.exists() else 0

    def kill(self) -> None:
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def log(self) -> str:
        return self._errors.read_text()


@pytest.fixture
def device(command: list[str], tmp_path: Path) -> Iterator[Callable[..., Device]]:
    """`device(url, token)` starts the client."""
    started: list[Device] = []

    def start(url: str, token: str = "") -> Device:
        started.append(Device(command, url, tmp_path, token))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def rows(consumer: Service) -> Counter[str]:
    with consumer.csv_file.open(newline="", encoding="utf-8") as file:
        return Counter(row["created_at"] for row in csv.DictReader(file, delimiter=";"))


def batches(producer: Service) -> float:
    return sum(
        producer.metric(f'predlog_http_requests_total{{route="/process/batch",status="{status}"}}')
        for status in (200, 207)
    )


def assert_one_row_each(consumer: Service, numbers: range) -> None:
    expected = Counter(f"#{number}" for number in numbers)
    wait_until("every event is a row", lambda: len(rows(consumer)) >= len(expected), explain=consumer.log)
    assert rows(consumer) == expected


def test_a_killed_producer_loses_and_duplicates_no_event(
    device: Callable[..., Device], producer: Start, consumer: Start
) -> None:
    """Events come while it is killed, away and started again. Those that gather meanwhile go as batches."""
    port = free_port()
    settings = {"HTTP_PORT": port, "API_TOKEN": "secret"}
    first, stored = producer(**settings), consumer()
    client = device(first.url, "secret")
    client.put(*(event(number) for number in range(COUNT // 2)))
    wait_until("some events are rows", lambda: stored.csv_file.exists() and rows(stored), explain=client.log)
    first.kill()
    client.put(*(event(number) for number in range(COUNT // 2, COUNT)))
    wait_until("the rest waits", lambda: client.spooled() >= COUNT // 2, explain=client.log)
    second = producer(**settings)
    client.finish()
    assert_one_row_each(stored, range(COUNT))
    assert batches(second) >= 1


def test_a_killed_client_continues_with_its_spool(
    device: Callable[..., Device], producer: Start, consumer: Start, nobodys_port: int
) -> None:
    """The kill also left half a line of an event that was not stored yet."""
    port = free_port()
    client = device(f"http://127.0.0.1:{port}")
    client.put(event(0))
    wait_until("it has tried", lambda: client.spooled() == 1 and client.log(), explain=client.log)
    client.put(*(event(number) for number in range(1, 50)))
    wait_until("all are spooled", lambda: client.spooled() == 50, explain=client.log)
    client.kill()
    with (client.spool / "open").open("ab") as file:
        file.write(b'{"device_id":"half')
    stored = consumer()
    producer(HTTP_PORT=port)
    client.start()
    client.finish()
    assert_one_row_each(stored, range(50))


def test_an_event_that_is_refused_for_good_stops_no_other(
    device: Callable[..., Device], producer: Start, consumer: Start, tmp_path: Path
) -> None:
    """One is not an event (422), one is too large (413), alone and within a batch."""
    port = free_port()
    client = device(f"http://127.0.0.1:{port}")
    bad, large = event(-1, prob="high"), event(-2, image_frame="x" * 20_000)
    client.put(bad)
    wait_until("it has tried", lambda: client.spooled() == 1 and client.log(), explain=client.log)
    client.put(event(0, **HOSTILE), bad, event(1), event(2))
    wait_until("all are spooled", lambda: client.spooled() == 5, explain=client.log)
    producer(HTTP_PORT=port, MAX_BODY_BYTES=10_000)
    stored = consumer()
    wait_until("all are answered", lambda: client.spooled() == 0, explain=client.log)
    client.put(large)
    wait_until("it is spooled and answered", lambda: "413" in client.log(), explain=client.log)
    client.put(event(3))
    client.finish()
    assert_one_row_each(stored, range(4))
    refused = (client.spool / "refused").read_text().splitlines()
    assert [json.loads(line) for line in refused] == [bad, bad, large]
    assert client.log().count("422, never sent again") == 2


class _Scripted(BaseHTTPRequestHandler):
    """A server that answers with the next of `answers`, and notes each request."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[list[tuple[int, dict[str, str], bytes]]]
    requests: ClassVar[list[tuple[str, str, bytes]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Idempotency-Key"], body))
        status, fields, content = self.answers.pop(0)
        if status == 0:  # no answer
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[_Scripted]]]:
    """The URL of a server that answers as its class says."""
    handler = type("Handler", (_Scripted,), {"answers": [], "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_retry_repeats_key_and_bytes_until_an_answer_is_final(
    device: Callable[..., Device], scripted: tuple[str, type[_Scripted]]
) -> None:
    """The answers are none, a redirect and a page of a captive portal, those of a proxy, and of predlog in trouble."""
    url, server = scripted
    server.answers[:] = [
        (0, {}, b""),
        (302, {"Location": "http://127.0.0.1:1/login"}, b"<html>"),
        (200, {"Content-Type": "text/html"}, b"<html>Please log in"),
        (502, {}, b"<html>"),
        (503, {"Retry-After": "0"}, b'{"detail":"the broker is away; nothing was accepted, try again"}'),
        (200, {}, b"{}"),
    ]
    client = device(url)
    client.put(event(0))
    client.finish()
    assert server.answers == []
    assert len(server.requests) == 6
    assert len(set(server.requests)) == 1
    path, key, body = server.requests[0]
    assert (path, json.loads(body)) == ("/process", event(0))
    assert len(key) >= 32


def test_a_batch_is_repeated_whole_until_each_event_is_settled(
    device: Callable[..., Device], scripted: tuple[str, type[_Scripted]]
) -> None:
    url, server = scripted
    mixed = [{"status": 200}, {"status": 503, "detail": 'a "status":200 in text'}, {"status": 422, "detail": []}]
    settled = [{"status": 200}, {"status": 200}, {"status": 422, "detail": []}]
    server.answers[:] = [
        (503, {"Retry-After": "1"}, b'{"detail":"shutting down"}'),  # while it waits, the others gather
        (200, {}, b"{}"),
        (207, {}, json.dumps({"accepted": 1, "results": mixed}, separators=(",", ":")).encode()),
        (207, {}, json.dumps({"accepted": 2, "results": settled}, separators=(",", ":")).encode()),
    ]
    client = device(url)
    client.put(event(0))
    wait_until("it was tried", lambda: server.requests, explain=client.log)
    client.put(event(1), event(2), event(3))
    client.finish()
    first, again, batch, retried = server.requests
    assert first == again
    assert batch == retried
    assert batch[0] == "/process/batch"
    assert [json.loads(line) for line in batch[2].splitlines()] == [event(1), event(2), event(3)]
    assert [json.loads(line) for line in (client.spool / "refused").read_text().splitlines()] == [event(3)]
    assert client.log().count("never sent again") == 1


class _Files(BaseHTTPRequestHandler):
    """A server of the JavaScript client, and of an empty page."""

    def do_GET(self) -> None:
        is_module = self.path.endswith(".mjs")
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if is_module else "text/html")
        self.end_headers()
        if is_module:
            self.wfile.write((EXAMPLES / "javascript" / "predlog_client.mjs").read_bytes())

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def origin() -> Iterator[str]:
    """The origin of a page that is not the producer's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no browser is installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


IN_THE_PAGE = """
const [url, events, done] = arguments;
import("/predlog_client.mjs").then(async ({ Client, browserStorage }) => {
  const client = new Client(url, browserStorage("spool"));
  events.forEach((event) => client.put(event));
  if (!events.length) await client.run(() => true);
  done(localStorage.getItem("spool"));
});
"""


def test_a_browsers_spool_outlives_the_page(
    browser: webdriver.Chrome, origin: str, producer: Start, consumer: Start
) -> None:
    """The page that sends is not the one that stored, and its origin is not the producer's."""
    service, stored = producer(CORS_ORIGINS=origin), consumer()
    events = [event(number) for number in range(5)]
    browser.get(origin)
    spool = json.loads(browser.execute_async_script(IN_THE_PAGE, service.url, events))
    assert spool["open"].count("\n") == len(events)
    browser.refresh()
    spool = json.loads(browser.execute_async_script(IN_THE_PAGE, service.url, []))
    assert spool == {"open": ""}
    assert_one_row_each(stored, range(5))
