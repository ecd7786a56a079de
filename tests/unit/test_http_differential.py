"""Streams that were not written by hand, through our parser, h11 and httptools.

What must hold is in tests/fuzz/http1_oracle.py, with the list of what we accept though h11 refuses it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz import http1_oracle, http1_streams


@pytest.mark.parametrize("path", sorted(http1_oracle.CORPUS.glob("*.http")), ids=lambda path: path.stem)
def test_a_corpus_stream_means_the_same_to_other_parsers(path: Path) -> None:
    """The others are h11 and httptools. It does not matter where the stream is cut."""
    stream = path.read_bytes()
    http1_oracle.check(stream)
    whole = http1_oracle.read([stream])
    for cut in range(1, len(stream)):
        assert http1_oracle.read([stream[:cut], stream[cut:]]) == whole


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
@settings(max_examples=3 * settings().max_examples, deadline=None, suppress_health_check=list(HealthCheck))
@given(http1_streams.stream, http1_streams.cuts)
def test_what_is_accepted_means_the_same_to_h11(stream: bytes, cuts: list[int]) -> None:
    """Cuts make no difference."""
    http1_oracle.check(stream, cuts)
