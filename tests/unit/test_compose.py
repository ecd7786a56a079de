"""The compose files: closed by default, refusing to start without secrets, and made of files that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "compose"
TRIAL: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
CLUSTER: dict[str, Any] = yaml.safe_load((FOLDER / "compose.cluster.yaml").read_text())
SECRETS: dict[str, Any] = yaml.safe_load((FOLDER / "secrets.yaml").read_text())


def test_by_default_only_this_machine_reaches_the_trial() -> None:
    ports = [port for service in TRIAL["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(re.match(r"127\.0\.0\.1:|\$\{HTTP_BIND:-127\.0\.0\.1\}:", port) for port in ports)


def test_the_cluster_does_not_start_without_secrets() -> None:
    """The cookie has no default, and passwords and tokens are files that only make-secrets makes."""
    text = (FOLDER / "compose.cluster.yaml").read_text()
    assert re.findall(r"\$\{(\w+)[:}]", text) == ["RABBITMQ_COOKIE", "HTTP_PORT"]
    assert "${RABBITMQ_COOKIE:?" in text
    for name in ("producer1", "producer2"):
        assert CLUSTER["services"][name]["environment"]["API_TOKEN_FILE"] == "/run/secrets/api_token"
    assert CLUSTER["secrets"] == {name: {"file": f"./secrets/{name}"} for name in ("amqp_url", "api_token")}


@pytest.mark.parametrize("project", [TRIAL | SECRETS, CLUSTER])
def test_a_process_has_the_secrets_whose_files_it_names(project: dict[str, Any]) -> None:
    named = 0
    for service in project["services"].values():
        for name, value in service.get("environment", {}).items():
            if name.endswith("_FILE"):
                named += 1
                assert Path(value).parent == Path("/run/secrets")
                assert Path(value).name in service["secrets"]
    assert named >= 3


@pytest.mark.parametrize(("project", "base"), [(TRIAL, ROOT), (SECRETS, ROOT), (CLUSTER, FOLDER)])
def test_every_file_that_is_mounted_exists_or_is_a_secret(project: dict[str, Any], base: Path) -> None:
    mounts = [mount for service in project["services"].values() for mount in service.get("volumes", [])]
    files = [base / mount.partition(":")[0] for mount in mounts if mount.startswith(".")]
    assert files
    assert [file for file in files if not file.is_file() and file.parent != FOLDER / "secrets"] == []


def test_git_keeps_no_secret() -> None:
    names = [".env", "deploy/.env", "deploy/compose/.env", "deploy/compose/secrets/amqp_url"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip(f"git does not work here: {done.stderr.strip()}")
    assert done.stdout.split() == names


def test_the_image_is_made_of_files_that_exist() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    files = [name for line in copied for name in line.split()]
    assert len(files) > 5
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in files:
        assert (ROOT / name).exists(), name
        assert any(name == each or each.startswith(f"{name}/") for each in allowed), name
