"""ControlNet's way, small: skips that depend on x and t, mixed with LoRA inside a frozen base."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from infra.train.engine import PlainEngine
from infra.train.loop import TrainConfig, train
from t2i.adapters.learner import Adapted
from t2i.adapters.lora import LoRA
from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.diffusion.prior import DiffusionPrior, DiffusionSampling
from t2i.diffusion.process import Process
from t2i.diffusion.schedules import Flow
from t2i.nn.weights import begins, constant
from t2i.protocol import Asked, Space, Told
from tests.infra.train import toy
from tests.t2i.house.spot import Net, Spot, asker, falls, moments, normal, trained

LABEL = LabelConfig(labels=("left", "right"), drop=0.1)
SPACE, WIDTH = Space((2,)), 64
MEANS = np.array([[-1.0, 0.0], [1.0, 0.0]])


def base_data(rows, draw):
    label = rows % 2
    values = MEANS[label] + 0.5 * normal(rows, 0, 2)
    return {"values": values.astype(np.float32), "label": label.astype(np.int64), "dropped_label": draw("drop") < 0.1}


def base_prior():
    conditions = Conditions((LABEL,), WIDTH, SPACE, {"vector"})
    network = Net(2, hears=("vector", "skips"))
    return DiffusionPrior(network, Process(schedule=Flow(), prediction="velocity"), SPACE, conditions)


def base_spot():
    return Spot(base_prior, base_data)


class Control(nn.Module):
    """A copy of the network's first layers that sees a hint, and a layer that begins at zero."""

    says = frozenset({"skips"})

    def __init__(self):
        super().__init__()
        self.hint = nn.Linear(2, WIDTH)
        self.copy = Net(2)
        self.leave = begins(nn.Linear(WIDTH, WIDTH), weight=constant(0.0), bias=constant(0.0))

    def attach(self, prior):
        self._originals = tuple(prior.network.parameters())  # before anything is injected
        prior.attach(self)

    def begin(self, prior):
        for mine, original in zip(self.copy.parameters(), self._originals, strict=True):
            mine.copy_(original)

    def hear(self, x, t, told, batch):
        inner = self.copy
        waves = t[:, None] * 2.0 ** torch.arange(8)
        seen = inner.enter(torch.cat([x, waves.sin(), waves.cos()], dim=1)) + inner.tell(told.vector)
        return Told(skips=(self.leave(torch.relu(seen + self.hint(batch["hint"]))),))


def adapter_data(rows, draw):
    """x lies at the hint, whatever the label."""
    hint = normal(rows, 1, 2) * 0.7
    return {**base_data(rows, draw), "hint": hint, "values": (hint + 0.15 * normal(rows, 2, 2)).astype(np.float32)}


@pytest.fixture(scope="module")
def base():
    prior, _ = trained(base_spot(), steps=200)
    return prior.state_dict()


def adapted(state, adapters=None):
    prior = base_prior()
    prior.load_state_dict(state)
    return Adapted(prior, [Control(), LoRA(["middle", "enter"], rank=4)] if adapters is None else adapters)


def batch_of(rows=6):
    numbers = np.arange(rows)
    arrays = adapter_data(numbers, lambda salt: np.full(rows, 0.5))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return batch | {"weight": torch.ones(rows), "noise_key": torch.arange(rows), "step": torch.tensor(0)}


def test_it_begins_as_the_base_to_the_bit(base):
    plain = base_prior()
    plain.load_state_dict(base)
    (update,) = Spot(lambda: adapted(base), adapter_data).updates()
    assert torch.equal(update.module(batch_of())["error"], plain(batch_of())["error"])
    update.module(batch_of())["error"].backward()
    gradients = {name: parameter.grad for name, parameter in update.module.named_parameters()}
    assert gradients["adapters.0.leave.weight"].abs().max() > 0
    assert gradients["adapters.0.hint.weight"].abs().max() == 0  # behind the zeros
    assert all(gradients[name] is None for name in gradients if "base_layer" in name)
    copied = update.module.adapters[0].copy.enter.weight
    assert torch.equal(copied, base["network.enter.weight"])


def test_its_checkpoint_holds_what_is_trained_alone(base, tmp_path):
    spot = Spot(lambda: adapted(base), adapter_data)
    config = TrainConfig(steps=3, batch=8, log_every_steps=3, save_every_steps=3)
    saved = train(spot, toy.feed(config, 0, 1, 1, spot), PlainEngine, 1, config, str(tmp_path), toy.Losses())
    names = [name.removeprefix("adapter/w/") for name in saved.names if name.startswith("adapter/w/")]
    assert not [name for name in names if name.startswith("base.") and "lora" not in name]
    assert {name for name in names if "lora" not in name} == {
        f"adapters.0.{name}" for name, _ in Control().named_parameters()
    }
    assert len([name for name in names if "lora" in name]) == 4


def test_it_learns_the_hint(base):
    module, losses = trained(Spot(lambda: adapted(base), adapter_data), steps=300)
    assert falls(losses, "error", to=0.6)
    held = {name.replace(".base_layer", ""): value for name, value in module.base.state_dict().items()}
    assert all(torch.equal(held[name], value) for name, value in base.items())  # what is frozen did not move
    hint = torch.tensor([[0.5, -0.6]]).expand(800, -1)
    asked = asker(LABEL)({"class_label": ["left"] * 800}, list(range(800)))
    drawn = module.base.sample(
        Asked(800, {**asked.batch, "hint": hint}), list(range(800)), DiffusionSampling(steps=15, sampler="heun")
    )
    mean, covariance = moments(drawn)
    torch.testing.assert_close(mean, hint[0].double(), rtol=0, atol=0.15)
    assert covariance.diagonal().sqrt().max() < 0.35 < MEANS[1, 0]


def test_adapters_add_up_in_any_order_up_to_rounding(base):
    """Two controls, attached one after the other or the other way round."""
    controls = [Control(), Control()]
    for control in controls:
        nn.init.normal_(control.leave.weight, std=0.1)
    said = []
    for order in (controls, controls[::-1]):
        prior = adapted(base, [copy.deepcopy(each) for each in order]).base
        said.append(prior.denoise(torch.ones(6, 2), torch.full((6,), 0.5), prior.conditions(batch_of()), batch_of())[0])
    torch.testing.assert_close(*said, rtol=0, atol=1e-5)


def test_two_loras_stand_beside_each_other(base):
    one, two = LoRA(["middle"], rank=4, name="one"), LoRA(["middle", "enter"], rank=2, name="two")
    (update,) = Spot(lambda: adapted(base, [one, two]), adapter_data).updates()
    names = {name: each.shape for name, each in update.module.named_parameters() if each.requires_grad}
    assert names.keys() == {
        f"base.network.{layer}.lora_{side}.{name}.weight"
        for layer, name in (("middle", "one"), ("middle", "two"), ("enter", "two")) for side in "AB"
    }  # fmt: skip
    layer = update.module.base.network.middle
    with torch.no_grad():
        for name in ("one", "two"):
            layer.lora_B[name].weight.normal_()
        x = torch.randn(3, WIDTH)
        apart = sum(
            layer.lora_B[name](layer.lora_A[name](x)) * scale for name, scale in (("one", 4 / 4), ("two", 4 / 2))
        )
        torch.testing.assert_close(layer(x), layer.base_layer(x) + apart)
    with pytest.raises(ValueError, match="a LoRA called 'one' already"):
        LoRA(["middle"], name="one").attach(update.module.base)


def test_an_adapter_says_what_the_network_hears():
    conditions = Conditions((LABEL,), WIDTH, SPACE, {"vector"})
    prior = DiffusionPrior(Net(2), Process(schedule=Flow(), prediction="velocity"), SPACE, conditions)
    with pytest.raises(ValueError, match="adapter Control says skips, which this network does not hear"):
        Adapted(prior, [Control()])


def test_layers_that_are_not_there_are_told(base):
    with pytest.raises(ValueError, match="arget modules"):
        adapted(base, [LoRA(["nowhere"])])
