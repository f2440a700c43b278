"""The plan of the rows: complete, exact at every world size, and the same from wherever one starts."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.train import plan as plan_module
from infra.train.draw import numeric_ids, permutation, uniforms
from infra.train.plan import BatchPlan

plans = st.builds(
    BatchPlan,
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    batch=st.integers(1, 13),
    seed=st.integers(0, 2**31),
    window_shards=st.integers(1, 5),
)


def triples(rows):
    return list(zip(rows.epoch.tolist(), rows.shard.tolist(), rows.row.tolist(), strict=True))


@given(plans, st.integers(1, 3))
def test_every_row_once_an_epoch(plan, epochs):
    steps = -(-plan.rows_per_epoch * epochs // plan.batch)
    seen = triples(plan.steps(0, steps))[: plan.rows_per_epoch * epochs]
    wanted = {(e, s, r) for e in range(epochs) for s, n in enumerate(plan.counts) for r in range(n)}
    assert len(seen) == len(wanted)
    assert set(seen) == wanted


@given(plans, st.integers(0, 40), st.integers(1, 5))
def test_a_step_does_not_depend_on_where_one_starts(plan, start, length):
    whole = triples(plan.steps(0, start + length))
    assert triples(plan.steps(start, start + length)) == whole[start * plan.batch :]


@given(plans, st.integers(1, 8), st.integers(0, 30), st.integers(0, 3))
def test_workers_together_compute_the_global_batch(plan, world, step, extra):
    padded = -(-plan.batch // world) + extra
    together = []
    for rank in range(world):
        rows, weight = plan.share(step, step + 2, rank, world, padded)
        assert len(rows) == len(weight) == 2 * padded
        together.append(
            [
                [t for t, w in list(zip(triples(rows), weight, strict=True))[i * padded : (i + 1) * padded] if w]
                for i in range(2)
            ]
        )
    for i in range(2):
        assert [t for part in together for t in part[i]] == triples(plan.steps(step + i, step + i + 1))


def test_a_million_steps_in_costs_what_the_first_step_costs(monkeypatch):
    made = []

    def counting(size, *key):
        made.append(size)
        return permutation(size, *key)

    monkeypatch.setattr(plan_module, "permutation", counting)
    plan = BatchPlan([10_000] * 100_000, 256, 0, 16)  # 10^9 rows: four million steps an epoch
    for step in (0, 1_000_000, 3_906_249, 10_000_000):
        made.clear()
        tracemalloc.start()
        rows = plan.steps(step, step + 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(rows) == 256
        # The shards of the epoch, and the rows of one or two windows; two epochs where the step straddles them.
        straddles = len(set(rows.epoch)) == 2
        assert made.count(100_000) == 1 + straddles
        assert sum(made) <= (1 + straddles) * 100_000 + 2 * 16 * 10_000
        assert peak < 50e6  # an int64 a row would be 8e9


def test_epochs_differ():
    plan = BatchPlan([50, 50], 100, 0, 2)
    assert triples(plan.steps(0, 1))[:10] != [(0, s, r) for _, s, r in triples(plan.steps(1, 2))[:10]]


def test_no_rows_is_said():
    with pytest.raises(ValueError, match="No row is left"):
        BatchPlan([0, 0], 4, 0, 1)


@given(st.integers(0, 300), st.integers(), st.integers(0, 9))
def test_permutation_is_one(size, seed, key):
    assert sorted(permutation(size, seed, key)) == list(range(size))


def test_uniforms_are_uniform_and_keyed():
    ids = np.arange(20_000, dtype=np.uint64)
    zeros = np.zeros(20_000)
    drawn = uniforms(0, zeros, ids, "caption")
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(np.histogram(drawn, 10, (0, 1))[0] - 2000).max() < 250
    for other in (
        uniforms(1, zeros, ids, "caption"),
        uniforms(0, zeros + 1, ids, "caption"),
        uniforms(0, zeros, ids, "drop"),
    ):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.03
    assert uniforms(0, zeros[:3], ids[5:8], "caption").tolist() == drawn[5:8].tolist()


def test_numeric_ids():
    assert numeric_ids(["00000000000000ff", "ffffffffffffffff00"]).tolist() == [255, 2**64 - 1]
