"""Blocks that are computed again give the same numbers bit for bit, and keep less."""

import pytest
import torch
from torch import nn

from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig
from infra.train.recompute import recompute
from infra.train.task import Update
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.sampling import SamplingConfig
from t2i.protocol import Asked, Space


class Chance(nn.Module):
    """Blocks with dropout, with batch norm, within each other, shared, and with an argument by name."""

    class Block(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part
            self.calls = 0

        def forward(self, x, *, gain):
            self.calls += 1
            return x + gain * self.part(x)

    def __init__(self):
        super().__init__()
        drop = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        nested = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), nn.Tanh())
        norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.layers = nn.ModuleList(self.Block(part) for part in (drop, nested, norm))
        self.layers.append(self.layers[0])

    def targets(self, batch):
        return {"square": batch["weight"].sum()}

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x, gain=batch["gain"])
        return {"square": ((x + torch.rand(8)).square().mean(1) * batch["weight"]).sum()}


def chance():
    return Chance(), {"x": torch.randn(6, 8), "gain": torch.tensor(0.7), "weight": torch.ones(6)}


def prior():
    config = AutoregressiveConfig(width=16, layers=3, heads=2, text_loss=True)
    model = config.build(Space((2, 3), codes=7), (WordsConfig(vocabulary_size=9, length=5),))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # blocks begin as the identity
    text = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    return model, {"text": text, "values": torch.randint(7, (2, 6)), "weight": torch.ones(2)}


def run(build, light, steps=4):
    """Losses, state and the state of chance after some steps; and what the module kept for the backward pass."""
    torch.manual_seed(0)
    model, batch = build()
    blocks = recompute(model) if light else None
    engine = PlainEngine(Update("net", model, OptimConfig(ema_decay=0.9)))
    losses, kept = [], 0
    for _ in range(steps):
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = torch.stack(list(engine(batch).values())).sum()
        kept = sum(sizes)
        engine.backward(loss)
        losses.append((loss.item(), engine.step(1e-2)))
    return losses, engine.state(), torch.get_rng_state(), kept, blocks


@pytest.mark.parametrize(("build", "blocks"), [(chance, 2), (prior, 3)])
def test_nothing_changes_but_what_is_kept(build, blocks):
    losses, state, chances, kept, none = run(build, light=False)
    light_losses, light_state, light_chances, light_kept, found = run(build, light=True)
    assert losses == light_losses
    assert state.keys() == light_state.keys()
    assert all(torch.equal(state[name], light_state[name]) for name in state)
    assert torch.equal(chances, light_chances)
    assert light_kept < 0.8 * kept
    assert (none, found) == (None, blocks)


def test_a_block_that_remembers_runs_once_a_step():
    torch.manual_seed(0)
    model, batch = chance()
    recompute(model)
    model(batch)["square"].backward()
    calls = [layer.calls for layer in model.layers[:3]]
    assert calls == [4, 2, 1]  # the first is in the list twice
    assert int(model.layers[2].part[1].num_batches_tracked) == 1


def test_a_prior_samples_as_before():
    torch.manual_seed(0)
    model, batch = prior()
    asked = Asked(2, {"text": batch["text"]})
    wanted = model.sample(asked, [3, 4], SamplingConfig())
    recompute(model)
    assert torch.equal(model.sample(asked, [3, 4], SamplingConfig()), wanted)
