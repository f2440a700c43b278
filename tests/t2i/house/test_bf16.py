"""Every hard spot trains with matrix products in 16 bits, near what it does in 32."""

import numpy as np
import pytest
import torch

from infra.train.draw import uniforms
from tests.t2i.house import worlds


@pytest.mark.parametrize("name", worlds.SPOTS)
def test_losses_and_gradients_are_near(name):
    spot = getattr(worlds, name)()
    rows = np.arange(64)
    arrays = spot.collate({"row": rows.tolist()}, lambda salt: uniforms(3, np.zeros(64), rows.astype(np.uint64), salt))
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    batch |= {"weight": torch.ones(64), "step": torch.tensor(2)}
    found = []
    for enabled in (False, True):
        module = spot.updates()[0].module
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():  # outputs that begin at zero have nothing to round
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = module(batch)
        sum(losses[key] for key in module.targets(batch)).backward()
        gradient = torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None])
        found.append((losses, gradient))
    (plain, wanted), (rounded, gradient) = found
    for key, loss in rounded.items():
        assert loss.item() == pytest.approx(plain[key].item(), rel=0.03)
    assert torch.nn.functional.cosine_similarity(gradient, wanted, dim=0) > 0.98
