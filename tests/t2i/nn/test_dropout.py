"""Dropout: the law of its masks, and that they depend on key, layer and step alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.nn.dropout import Dropout
from t2i.random import keys_of

KEYS = keys_of(range(32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 - 2**-16])
def test_the_share_and_the_mean_are_right(p):
    out = Dropout(p, "layer")(torch.ones(32, 100, 101), KEYS, 5)
    count = out.numel()
    gone = float((out == 0).double().mean())
    assert gone == pytest.approx(p, abs=2**-17 + 4 * math.sqrt(p * (1 - p) / count))
    assert out[out > 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=2**-16 / (1 - p))


@given(st.permutations(range(8)), st.integers(1, 8))
def test_neither_batch_nor_micro_batches_enter(order, size):
    layer, x = Dropout(0.3, "layer"), torch.randn(8, 3, 5)
    whole = layer(x, KEYS[:8], 2)
    for start in range(0, 8, size):
        rows = torch.tensor(order[start : start + size])
        assert torch.equal(layer(x[rows], KEYS[rows], 2), whole[rows])


def test_rows_layers_and_steps_have_masks_of_their_own():
    shape = torch.Size([1000])
    masks = [
        Dropout(0.5, name).mask(KEYS[row : row + 1], shape, step)[0]
        for name in ("one", "two")
        for row in range(3)
        for step in range(3)
    ]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert float((mask == other).double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(1000))


def test_gradients_pass_where_values_do():
    x = torch.ones(2, 50, requires_grad=True)
    out = Dropout(0.25, "layer")(x, KEYS[:2])
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_it_is_off_in_evaluation_and_at_zero():
    x = torch.randn(2, 5)
    assert Dropout(0.5, "layer").eval()(x, KEYS[:2]) is x
    assert Dropout(0.0, "layer")(x, KEYS[:2]) is x


def test_half_precision_stays():
    out = Dropout(0.5, "layer")(torch.ones(2, 50, dtype=torch.bfloat16), KEYS[:2])
    assert out.dtype == torch.bfloat16
    assert set(out.flatten().tolist()) == {0.0, 2.0}


def test_all_cannot_be_dropped():
    with pytest.raises(ValueError, match="leaves a part"):
        Dropout(1.0, "layer")
