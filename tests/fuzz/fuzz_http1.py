"""Fuzz the HTTP/1.1 parser for some time: `python -m tests.fuzz.fuzz_http1 [SECONDS] [CORPUS]`.

It uses atheris when that is installed (coverage-guided; it keeps what it learned in the folder CORPUS), and hypothesis
otherwise. It ends with counts, or with a failure and the stream that caused it if the parser broke a promise.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    atheris = None

if atheris is not None:
    with atheris.instrument_imports(include=["common.http"]):
        import common.http.parser  # noqa: F401 (instrumented by its first import)

from tests.fuzz import http1_oracle

DICTIONARY = Path(__file__).parent / "http1.dict"

counts: Counter[str] = Counter()


def report() -> None:
    width = len(str(max(counts.values(), default=0)))
    for what, count in sorted(counts.items()):
        print(f"{count:{width}}  {what}")


def fuzz_with_atheris(seconds: int, corpus: list[str]) -> None:
    deadline = time.monotonic() + seconds

    def one(data: bytes) -> None:
        # libFuzzer never returns, and takes an exception for a crash.
        if time.monotonic() > deadline:
            report()
            sys.stdout.flush()
            os._exit(0)
        # The first byte says where a stream is cut.
        counts.update(http1_oracle.check(data[1:], [len(data) * data[0] // 256] if data else []))

    # libFuzzer writes into the first folder of a corpus, and what breaks a promise beside it.
    folder = corpus[0] if corpus else tempfile.mkdtemp(prefix="fuzz-http1-")
    options = ["-max_len=1500", f"-dict={DICTIONARY}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, folder, str(http1_oracle.CORPUS)], one)
    atheris.Fuzz()


def fuzz_with_hypothesis(seconds: int) -> None:
    from hypothesis import HealthCheck, given, seed, settings

    from tests.fuzz import http1_streams

    deadline = time.monotonic() + seconds

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(http1_streams.stream, http1_streams.cuts)
    def round_of_examples(stream: bytes, cuts: list[int]) -> None:
        counts.update(http1_oracle.check(stream, cuts))

    rounds = 0
    while time.monotonic() < deadline:
        seed(time.time_ns())(round_of_examples)()
        rounds += 1
    report()


if __name__ == "__main__":
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    print(f"fuzzing common.http.parser for {seconds} s with {'hypothesis' if atheris is None else 'atheris'}")
    if atheris is None:
        fuzz_with_hypothesis(seconds)
    else:
        fuzz_with_atheris(seconds, sys.argv[2:3])
