"""Memory of weights and Adam states."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.memory import Memory, full_rank_memory, galore_memory, lora_memory


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 60))
def test_sizes_are_those_of_the_arrays(m, n, rank):
    r = min(rank, m, n)
    short, long = sorted((m, n))
    assert full_rank_memory(m, n).total == 3 * m * n
    assert lora_memory(m, n, rank).total == m * n + 3 * (m * r + n * r)
    assert lora_memory(m, n, rank, frozen=False).total == 3 * (m * r + n * r)
    for projection, left, right in (
        ("std", short, None),
        ("reverse_std", long, None),
        ("left", m, None),
        ("right", n, None),
        ("full", m, n),
    ):
        projected = r * r if right else r * (m + n - left)
        size = galore_memory(m, n, rank, projection)
        assert size == Memory(m * n, 2 * projected, r * (left + (right or 0)))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        galore_memory(2, 3, 0)
    with pytest.raises(ValueError, match="projection must be one of"):
        galore_memory(2, 3, 1, "short")
