"""A short seeded run of trouble on a cluster of three nodes."""

from pathlib import Path

from rich.console import Console

from tests.chaos.__main__ import Limit, run


def test_the_promise_holds_while_a_cluster_loses_nodes(tmp_path: Path) -> None:
    """One of three is cut off from the others, then one is killed: two continue, and three are whole again."""
    report = run(12, Limit(2, 0), tmp_path, Console(quiet=True), 3, ("cut_off_node", "kill_node"), events=500, rate=100)
    assert report.good, (str(report.verdict), report.problems)
    done = report.trouble.done
    assert (done["kill -9 node"], done["node cut off from the others"]) == (1, 1)
