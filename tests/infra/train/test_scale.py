"""The loss scale against torch's own, and through a checkpoint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.train import scale
from infra.train.scale import LossScale


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 7), st.integers(0, 60))
def test_it_is_what_torch_would_have_scaled_by_and_goes_on_from_a_checkpoint(steps, patience, cut):
    oracle = torch.amp.GradScaler("cpu", init_scale=2.0**70, growth_interval=patience)
    optimizer = torch.optim.SGD([weight := torch.nn.Parameter(torch.ones(1))], lr=0.0)
    oracle.scale(torch.ones(1))  # it makes its tensor at the first call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "PATIENCE", patience)
        ours = LossScale(2.0**70)
        for number, finite in enumerate(steps):
            if number == cut:
                ours = LossScale(**ours.meta())
            weight.grad = torch.tensor([1.0 if finite else float("inf")])
            oracle.step(optimizer)
            oracle.update()
            ours.update(finite)
            assert ours.value == oracle.get_scale()


def test_a_gradient_that_no_scale_helps_is_an_error():
    ours = LossScale()
    for _ in range(16):
        ours.update(False)
    assert ours.value == 1
    with pytest.raises(FloatingPointError, match="even with a loss scale of 1"):
        ours.update(False)
