"""The function that other publishers must share, by the contract's own vectors."""

import pytest

from common.event.ids import partition_of


@pytest.mark.parametrize(
    ("device_id", "of_4", "of_16"),
    [("camera-7", 1, 9), ("dévice 1", 1, 1), ("17", 2, 1060745282 % 16), ("", 0, 0)],
)
def test_a_device_is_in_the_contracts_partition(device_id: str, of_4: int, of_16: int) -> None:
    assert partition_of(device_id, 1) == 0
    assert partition_of(device_id, 4) == of_4
    assert partition_of(device_id, 16) == of_16
