"""The file of dead letters that wait: whole letters in their order, also after a crash."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.amqp.codec import Delivery
from common.consumer.dead_letters import spill as spill_module
from common.consumer.dead_letters.spill import DamagedLine, Spill
from common.consumer.prepare import Poison


def letters(*bodies: bytes) -> list[Poison]:
    return [Poison(Delivery(number, False, b"\0header", body), "not_json", "ö") for number, body in enumerate(bodies)]


def bodies(spill: Spill) -> list[bytes]:
    """All of them, read and removed page by page."""
    found = []
    while spill.waiting:
        page, size = spill.page()
        found += [each.delivery.body for each in page]
        spill.remove(size)
    return found


def test_letters_come_back_whole_and_in_order(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path / "spill"))
    assert not spill.waiting
    wanted = [os.urandom(1000), b"", b"\n\r\x00", *(b"%d" % number for number in range(250))]
    assert spill.append(letters(*wanted)) == len(wanted)
    page, _ = spill.page()
    assert page[0].delivery.header == b"\0header"
    assert (page[0].kind, page[0].reason) == ("not_json", "ö")
    assert bodies(spill) == wanted
    assert not (tmp_path / "spill").exists()
    spill.append(letters(b"again"))
    assert bodies(spill) == [b"again"]


def test_a_letter_larger_than_a_page_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_module, "PAGE_BYTES", 100)
    spill = Spill(str(tmp_path / "spill"))
    spill.append(letters(b"x" * 1000, b"y"))
    assert bodies(spill) == [b"x" * 1000, b"y"]


def test_what_waits_survives_a_restart_but_for_a_torn_line(tmp_path: Path) -> None:
    """What waits is there after a restart but for a torn line."""
    path = tmp_path / "spill"
    spill = Spill(str(path))
    spill.append(letters(b"1", b"2"))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Spill(str(path))
        count = whole[:cut].count(b"\n")
        assert again.waiting is (count > 0)
        again.append(letters(b"3"))
        assert bodies(again) == [*[b"1", b"2"][:count], b"3"]


def test_no_more_than_its_bound_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_module, "MOST_BYTES", 1000)
    spill = Spill(str(tmp_path / "spill"))
    taken = spill.append(letters(*[b"x"] * 100))
    assert 0 < taken < 100
    assert spill.bytes <= 1000
    assert bodies(spill) == [b"x"] * taken


def test_a_damaged_line_is_told_and_the_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    spill = Spill(str(path))
    spill.append(letters(b"1"))
    path.write_bytes(path.read_bytes().replace(b"not_json", b"not_jsno"))
    with pytest.raises(DamagedLine):
        spill.page()
    aside = spill.set_aside()
    assert Path(aside).exists()
    assert not spill.waiting


def test_letters_are_synced_before_they_are_acked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`append` returns, and lets the caller ack, only after an fsync of the whole file."""
    path = tmp_path / "spill"
    spill = Spill(str(path))
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    for body in (b"first", b"second"):
        spill.append(letters(body))
        assert synced[-1] == path.stat().st_size == spill.bytes
    spill.close()


def test_a_failed_append_leaves_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller repeats it: a letter must not be there twice, and no half line before it."""
    path = tmp_path / "spill"
    spill = Spill(str(path))
    spill.append(letters(b"first"))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as failure:
            spill.append(letters(b"second"))
    assert failure.value.filename == str(path)
    spill.append(letters(b"second"))
    assert bodies(spill) == [b"first", b"second"]
