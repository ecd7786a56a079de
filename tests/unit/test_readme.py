"""What README says of the settings is what the code says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from common import config

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("kind", [config.ProducerSettings, config.ConsumerSettings])
def test_every_setting_is_in_the_readme_with_its_default_and_its_help(kind: type[config.Settings]) -> None:
    for item in fields(kind):
        default = config.DEFAULT_AMQP_URL if item.name == "amqp_url" else item.default
        shown = int(default) if isinstance(default, bool) else default
        text = item.metadata["help"].partition(" (default amqp")[0]
        cell = f"`{shown}`" if shown != "" else "none"
        assert f"| `{item.name.upper()}` | {cell} | {text} |" in README
