"""Producers behind a real HAProxy with the configuration of deploy/: no client sees a restart."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Start
from tests.integration.test_behind_nginx import Load
from tests.support.haproxy import haproxy, needs_haproxy


@needs_haproxy
def test_a_stop_behind_haproxy_is_seen_by_nobody(producer: Start, tmp_path: Path) -> None:
    """During the delay that compose.cluster.yaml sets, HAProxy sees that /readyz is 503, and sends no more."""
    leaving, staying = producer(DRAIN_DELAY_MS=2000), producer()
    with haproxy(tmp_path / "haproxy", [leaving.url, staying.url]) as url, Load(url) as load:
        assert leaving.stop() == 0
        load.wait_for_more()
    assert set(load.statuses) == {200}, load.statuses
