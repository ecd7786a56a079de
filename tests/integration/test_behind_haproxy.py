"""Producers behind a real HAProxy with the configuration of deploy/: no client sees a restart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.conftest import Start
from tests.integration.test_behind_nginx import DELAYS_MS, Load, leave
from tests.support.haproxy import haproxy, needs_haproxy, wait_until_down


@needs_haproxy
def test_a_stop_behind_haproxy_is_seen_by_nobody(producer: Start, tmp_path: Path) -> None:
    """During the delay that compose.cluster.yaml sets, HAProxy sees that /readyz is 503, and sends no more."""
    for delay_ms in DELAYS_MS:
        leaving, staying = producer(DRAIN_DELAY_MS=delay_ms), producer()
        folder = tmp_path / f"haproxy-{delay_ms}"
        with haproxy(folder, [leaving.url, staying.url]) as url, Load(url) as load:
            in_time = leave(leaving, partial(wait_until_down, folder, 1))
            load.wait_for_more()
        if in_time:
            break
    assert set(load.statuses) == {200}, load.statuses
