"""What a goal of make needs, and what it can do without."""

from __future__ import annotations

import pytest

from scripts import setup


def test_the_benchmark_continues_without_mq_bridge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(name: str, *_: str) -> str | None:
        return f"pip could not install {name}" if name == "requirements-bench.txt" else None

    monkeypatch.setattr(setup, "is_installed", lambda package: True)
    monkeypatch.setattr(setup, "install_requirements", install)
    assert setup.main(["bench"]) is None
    assert "continues without mq-bridge" in capsys.readouterr().out


def test_the_benchmark_needs_the_pinned_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "is_installed", lambda package: True)
    monkeypatch.setattr(setup, "install_requirements", lambda name, *_: f"pip could not install {name}")
    assert setup.main(["bench"]) == "pip could not install requirements-dev.txt"
