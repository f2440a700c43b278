"""The hard spots as tasks by name, for workers that are other processes."""

import functools

import torch

from tests.t2i.house import test_adapters, test_chain, test_consistency, test_encoded, test_gan, test_masked
from tests.t2i.house.spot import Spot


def embedding():
    return test_chain.spots()["embedding"]


def values():
    return test_chain.spots()["values"]


masked, encoded, gan = test_masked.spot, test_encoded.picture_spot, test_gan.spot


@functools.cache
def _state(make):
    """Weights that are the same in each process: those of a seed."""
    (update,) = make().updates()
    generator = torch.Generator().manual_seed(0)
    state = update.module.state_dict()
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def adapter():
    return Spot(lambda: test_adapters.adapted(_state(test_adapters.base_spot)), test_adapters.adapter_data)


def consistency():
    return test_consistency.student_spot(_state(test_consistency.teacher_spot))


SPOTS = ("embedding", "values", "masked", "encoded", "gan", "adapter", "consistency")
WHOLE = ("gan", "consistency")  # whose turns need all weights
