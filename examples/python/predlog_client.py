"""A device's client for predlog: each event becomes its rows exactly once, through outages, kills and power cuts.

Standard library only, Python 3.10 or newer. In a program:

    client = Client("http://predlog.example:8000", "spool", token="")
    threading.Thread(target=client.run, daemon=True).start()
    client.put(event)  # returns once the event is on this device's disk

As a program, it reads one JSON event per line from stdin, and ends when all of them have been answered:

    API_TOKEN=... python3 predlog_client.py http://predlog.example:8000 spool/ < events.ndjson

The spool is a folder that one process uses at a time:

    open               events that were never sent, one JSON line each; only appended to
    <number>-<random>  a request; it never changes, its name is its Idempotency-Key, and it stays until it is answered
    refused            the first MB of events that predlog will never take (413, 422), for a person to look at

Key and position name an event of a batch, so a retry must repeat the same bytes under the same key. That is why `open`
is first renamed to a request, and only then sent. A single waiting event is sent to /process, several as a batch.
"""

import http.client
import json
import os
import random
import sys
import threading
import time
import uuid
from urllib.parse import urlsplit

BATCH_BYTES = 256 * 1024  # of one request; predlog takes MAX_BODY_BYTES (8 MiB)
SPOOL_BYTES, REFUSED_BYTES = 256 * 1024 * 1024, 1024 * 1024
ANSWER_SECONDS = 30  # longer than predlog waits for its broker (CONFIRM_TIMEOUT_MS, 10 s)
LONGEST_PAUSE_SECONDS = 60
ACCEPTED, NEVER = 200, (413, 422)  # with 413 and 422 the event itself is at fault, so a retry cannot help


class Client:
    def __init__(self, url: str, folder: str, token: str = "") -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = connection(parts.netloc, timeout=ANSWER_SECONDS)
        self._fields = {"Authorization": f"Bearer {token}"} if token else {}
        self._folder = folder
        self._lock = threading.Lock()  # of the spool
        self._changed = threading.Event()
        os.makedirs(folder, exist_ok=True)
        with open(self._path("open"), "ab+") as file:  # a kill can leave half a line, from a `put` that never returned
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def put(self, event: object) -> None:
        """Store an event on disk. Raise OSError when the spool or the disk is full."""
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if sum(map(self._size, [*self._requests(), "open"])) + len(line) > SPOOL_BYTES:
                raise OSError(f"the spool {self._folder} is full")
            if self._size("open") > 0 and self._size("open") + len(line) > BATCH_BYTES:
                self._seal()
            self._append("open", line)
        self._changed.set()

    def run(self, until: threading.Event | None = None) -> None:
        """Send what is in the spool, oldest first, until it is empty and the event `until` is set."""
        attempts = 0
        while True:
            name = self._oldest()
            if name is None:
                if until is not None and until.is_set():
                    return
                self._changed.wait(1)
                self._changed.clear()
            elif (retry_after := self._send(name)) is None:
                attempts = 0
            else:  # a random pause, so that devices which lost their server together do not return together
                time.sleep(retry_after + random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.5 * 2**attempts)))
                attempts = min(attempts + 1, 10)

    def _send(self, name: str) -> int | None:
        """Send one request. Return None once it is settled, else the least number of seconds until its retry."""
        with open(self._path(name), "rb") as file:
            lines = file.readlines()
        statuses, retry_after, text = self._post(name, lines)
        if any(status != ACCEPTED and status not in NEVER for status in statuses):
            print(f"predlog: {len(lines)} event(s) wait: {text}", file=sys.stderr)
            return retry_after
        with self._lock:
            for line, status in zip(lines, statuses, strict=True):
                if status in NEVER:
                    print(f"predlog: {status}, never sent again: {line[:200]!r}", file=sys.stderr)
                    if self._size("refused") + len(line) <= REFUSED_BYTES:
                        self._append("refused", line)
            os.remove(self._path(name))
        return None

    def _post(self, key: str, lines: list[bytes]) -> tuple[list[int], int, str]:
        """Return the status of each line, the seconds of Retry-After, and what was answered."""
        path, content_type = ("/process", "json") if len(lines) == 1 else ("/process/batch", "x-ndjson")
        fields = {"Content-Type": f"application/{content_type}", "Idempotency-Key": key, **self._fields}
        try:
            self._connection.request("POST", path, b"".join(lines), fields)
            answer = self._connection.getresponse()
            content, seconds = answer.read(), answer.headers.get("Retry-After", "")
            if answer.status == 207:
                statuses = [result["status"] for result in json.loads(content)["results"]]
            else:
                statuses = [answer.status] * len(lines)
                if answer.status == ACCEPTED:
                    json.loads(content)  # a captive portal's page is no answer
            return statuses, int(seconds) if seconds.isdigit() else 0, f"{answer.status} {content[:200]!r}"
        except (OSError, ValueError, http.client.HTTPException) as error:  # no answer: the outcome is unknown
            self._connection.close()  # the next request opens it again
            return [0] * len(lines), 0, f"no answer ({error!r})"

    def _oldest(self) -> str | None:
        with self._lock:
            if not self._requests() and self._size("open"):
                self._seal()
            return min(self._requests(), default=None)

    def _seal(self) -> None:
        """Make a request of what is in `open`, before its first attempt."""
        number = int(max(self._requests(), default="0").partition("-")[0]) + 1
        os.rename(self._path("open"), self._path(f"{number:010}-{uuid.uuid4().hex}"))
        self._sync_folder()  # after a power cut, the request must still have the name it was sent with

    def _append(self, name: str, line: bytes) -> None:
        start = self._size(name)
        with open(self._path(name), "ab", buffering=0) as file:
            try:
                if file.write(line) < len(line):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)  # leave no half line
                raise
        if start == 0:
            self._sync_folder()

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _requests(self) -> list[str]:
        return [name for name in os.listdir(self._folder) if name[0].isdigit()]

    def _size(self, name: str) -> int:
        return os.path.getsize(self._path(name)) if os.path.exists(self._path(name)) else 0

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def main() -> None:
    client, ended = Client(sys.argv[1], sys.argv[2], os.environ.get("API_TOKEN", "")), threading.Event()
    sender = threading.Thread(target=client.run, args=(ended,), daemon=True)
    sender.start()
    for line in filter(str.strip, sys.stdin):
        try:
            client.put(json.loads(line))
        except (OSError, ValueError) as error:
            print(f"predlog: an event was dropped: {error}", file=sys.stderr)
    ended.set()
    sender.join()


if __name__ == "__main__":
    main()
