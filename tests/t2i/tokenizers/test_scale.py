"""The scale of latents, measured in parts, against NumPy on the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.tokenizers.scale import Sums, measured, sums_of


def latents(rows, seed=0, channels=3):
    """Pictures of several sizes, whose channels differ in mean and deviation."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, (rows, 2))
    means, deviations = rng.normal(size=channels) * 10, rng.uniform(0.1, 4, channels)
    return [(rng.normal(size=(channels, *size)).T * deviations + means).T.astype(np.float32) for size in sizes]


@given(st.integers(0, 1000), st.integers(2, 30))
def test_it_is_that_of_all_latents_together(seed, rows):
    found = latents(rows, seed)
    flat = np.concatenate([each.reshape(3, -1) for each in found], axis=1).astype(np.float64)
    scale = measured([sums_of(each) for each in found])
    assert scale.shift == pytest.approx((flat.mean(),), rel=1e-12)
    assert scale.factor == pytest.approx((1 / flat.std(),), rel=1e-12)
    own = measured([sums_of(each) for each in found], channels=True)
    assert own.shift == pytest.approx(flat.mean(axis=1), rel=1e-12)
    if flat.shape[1] > 3:
        assert own.factor == pytest.approx(1 / flat.std(axis=1), rel=1e-9)
        values = own.to(torch.from_numpy(flat)[None, :, None])
        assert values.mean((0, 2, 3)).numpy() == pytest.approx(np.zeros(3), abs=1e-9)
        assert values.std((0, 2, 3), unbiased=False).numpy() == pytest.approx(np.ones(3))


def test_the_order_of_rows_changes_no_bit():
    sums = [sums_of(each) for each in latents(64)]
    assert measured(sums) == measured(sums[::-1]) == measured(sums[32:] + sums[:32])
    assert measured(sums, channels=True) == measured(sums[::-1], channels=True)


def test_a_mean_far_from_0_costs_no_digits():
    found = [each * 1e-3 + np.float32(1000) for each in latents(8)]
    flat = np.concatenate([each.astype(np.float64).ravel() for each in found])
    assert measured([sums_of(each) for each in found]).factor[0] == pytest.approx(1 / flat.std(), rel=1e-9)


def test_embeddings_have_one_value_a_channel():
    found = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    scale = measured([sums_of(each) for each in found], channels=True)
    values = scale.to(torch.from_numpy(found))
    torch.testing.assert_close(values.std(0, unbiased=False), torch.ones(4))
    torch.testing.assert_close(scale.back(values), torch.from_numpy(found))


def test_a_dead_channel_is_not_blown_up():
    found = [np.concatenate([each, np.full((1, *each.shape[1:]), 7.0, np.float32)]) for each in latents(8)]
    scale = measured([sums_of(each) for each in found], channels=True)
    assert scale.shift[3] == 7
    assert scale.factor[3] < 1000


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf], ids=str)
def test_latents_that_tell_nothing_apart_are_told(value):
    with pytest.raises(ValueError, match="tell nothing apart"):
        measured([Sums(4, [value], [0.0])] * 3)
