import math

from hypothesis import given
from hypothesis import strategies as st

from infra.data.portions import split
from infra.data.run import SHARES


@given(st.integers(0, 5000), st.integers(1, 1200))
def test_portions_grow_smaller_and_are_few(shards, shares):
    names = [str(n) for n in range(shards)]
    portions = split(names, shares)
    assert [name for portion in portions for name in portion] == names
    sizes = [len(portion) for portion in portions]
    assert sizes == sorted(sizes, reverse=True)
    assert shares == 1 or set(sizes[1 - shares :]) <= {1}
    assert len(portions) <= shares * (1 + math.log(max(shards / shares, 1))) + 1


def test_a_million_shards_are_some_thousand_blocks():
    portions = split([""] * 1_000_000, SHARES)
    assert len(portions) < 8000
    assert len(portions[0]) == 1000
