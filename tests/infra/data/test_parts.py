import math

from hypothesis import given
from hypothesis import strategies as st

from infra.data.parts import split
from infra.data.run import SHARES


@given(st.integers(0, 5000), st.integers(1, 1200))
def test_parts_grow_smaller_and_are_few(shards, shares):
    names = [str(n) for n in range(shards)]
    parts = split(names, shares)
    assert [name for part in parts for name in part] == names
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert shares == 1 or set(sizes[1 - shares :]) <= {1}
    assert len(parts) <= shares * (1 + math.log(max(shards / shares, 1))) + 1


def test_a_million_shards_are_some_thousand_blocks():
    parts = split([""] * 1_000_000, SHARES)
    assert len(parts) < 8000
    assert len(parts[0]) == 1000
