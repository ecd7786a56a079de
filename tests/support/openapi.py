"""The OpenAPI document of a producer, and its examples."""

from __future__ import annotations

import json
from typing import Any

from common.config import ProducerSettings
from common.producer import openapi
from common.producer.api import OPENAPI


def document(settings: ProducerSettings) -> dict[str, Any]:
    """The document of a producer with these settings."""
    found: dict[str, Any] = json.loads(
        openapi.document(OPENAPI.read_text(), "1.2.3", settings, has_tokens=bool(settings.api_token))
    )
    return found


_PROCESS, _BATCH = (document(ProducerSettings())["paths"][path]["post"] for path in ("/process", "/process/batch"))
EVENT_EXAMPLES: dict[str, Any] = _PROCESS["requestBody"]["content"]["application/json"]["examples"]
REFUSED_EXAMPLES: dict[str, Any] = _PROCESS["x-refused-examples"]
BATCH_EXAMPLES: dict[str, Any] = _BATCH["requestBody"]["content"]["application/json"]["examples"]
LINES_EXAMPLES: dict[str, Any] = _BATCH["requestBody"]["content"]["application/x-ndjson"]["examples"]
EVENT: dict[str, Any] = EVENT_EXAMPLES["event"]["value"]
