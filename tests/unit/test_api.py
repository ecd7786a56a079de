"""Parts of the API that need no broker."""

from __future__ import annotations

import uuid
from itertools import islice

from common.producer.intake import random_uuids


def test_ids_without_a_key_are_random_version_4_uuids() -> None:
    ids = list(islice(random_uuids(), 1000))
    assert len(set(ids)) == 1000
    for text in ids:
        made = uuid.UUID(text.decode())
        assert (made.version, made.variant, made.hex.encode()) == (4, uuid.RFC_4122, text)
