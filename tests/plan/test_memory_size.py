from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leantrain.errors import UsageError
from leantrain.plan.memory_size import UNITS, memory_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("22.5 GiB", 45 * 2**29),
        ("1kB", 1000),
        ("7B", 7),
        ("2TB", 2 * 10**12),
    ],
)
def test_a_size_means_what_its_unit_means(text: str, size: int):
    assert memory_size(text) == size


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_every_unit_multiplies(number: int, unit: str):
    assert memory_size(f"{number}{unit}") == number * UNITS[unit]


@pytest.mark.parametrize(
    "text", ["24", "24gb", "24 G", "GB", "-1GB", "0GB", "1e3MB", "24GB ", "", "0.1B", "nanGB", "٣GB"]
)
def test_anything_else_is_refused_with_the_units(text: str):
    with pytest.raises(UsageError) as error:
        memory_size(text)
    assert repr(text) in str(error.value)
    assert "GiB" in str(error.value)
