"""The OpenAPI document of GET /openapi.json, and the headers of GET /docs. Pure: text and bytes from arguments.

The document is openapi.json beside this module. It is the contract for machines, and says neither more nor less than
the producer does: a test tries every statement of it on a live one.
"""

import json
import re
from base64 import b64encode
from hashlib import sha256

from common.config import ProducerSettings
from common.event.schema import MAX_EVENTS
from common.producer.routes import ROUTES


def document(template: str, version: str, settings: ProducerSettings, has_tokens: bool) -> bytes:
    """Return the document of a producer with these settings: `template` with its @NAMES@ replaced.

    The template asks for a token at every path that ever wants one.
    """
    text = template.replace("@VERSION@", version).replace("@MAX_BODY@", f"{settings.max_body_bytes} bytes")
    text = text.replace('"@MAX_PREDS@"', str(settings.max_preds)).replace("@MAX_EVENTS@", f"{MAX_EVENTS:,}")
    result = json.loads(text)
    for path, operations in result["paths"].items():
        if not (has_tokens and ROUTES[path.encode()].wants_token(settings.protect_pages)):
            for operation in operations.values():
                operation.pop("security", None)
                operation["responses"].pop("401", None)
    return json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode()


def page_headers(page: bytes) -> bytes:
    """Return header lines for the page. Its policy allows only the page's own styles and scripts, by their digests."""

    def digests(tag: bytes) -> str:
        blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(block).digest()).decode()}'" for block in blocks)

    policy = (
        f"default-src 'none'; script-src {digests(b'script')}; style-src {digests(b'style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    lines = (
        f"Content-Security-Policy: {policy}",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: no-referrer",
        "Cross-Origin-Opener-Policy: same-origin",
        "Cache-Control: no-cache",
    )
    return "".join(f"{line}\r\n" for line in lines).encode()
