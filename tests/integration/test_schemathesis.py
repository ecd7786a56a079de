"""/openapi.json is true: schemathesis tries every statement of it on a live producer, with all its checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import Start

MAX_PREDS = 20  # one more makes a list too long: schemathesis tries both, and 10,000 of them would take minutes

# It knows JSON; NDJSON is any text. To JSON Schema 1.0 is an integer, to JSON parsers it is not.
HOOKS = """
import json
import schemathesis

@schemathesis.serializer("application/x-ndjson")
def ndjson(context, value):
    return (value if isinstance(value, str) else json.dumps(value)).encode()

@schemathesis.hook
def filter_body(context, body):
    members = body if isinstance(body, dict) else {}
    data = members.get("data") if isinstance(members.get("data"), dict) else {}
    ids = [data.get("license_id"), *(members.get(name) for name in ("device_id", "client_id", "created_at"))]
    return not any(isinstance(each, float) and each.is_integer() for each in ids)
"""


def test_schemathesis_finds_nothing_with_all_its_checks(producer: Start, tmp_path: Path) -> None:
    service = producer(MAX_PREDS=MAX_PREDS, API_TOKEN="s3cret")
    (tmp_path / "hooks.py").write_text(HOOKS)
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
        *("run", f"{service.url}/openapi.json", "--header", "Authorization: Bearer s3cret"),
        *("--checks", "all", "--mode", "all", "--max-examples", "20", "--seed", "1"),
        *("--generation-database", "none", "--no-color"),
        *("--suppress-health-check", "too_slow", "--request-timeout", "60"),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    print(done.stdout[done.stdout.find("SUMMARY") :])
    assert service.process.poll() is None, service.log()
    assert done.returncode == 0, done.stdout + done.stderr
    generated = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert generated is not None, done.stdout
    assert int(generated[1]) >= 100
