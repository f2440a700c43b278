"""Blocks that are computed again give the same numbers bit for bit, and keep less."""

import pytest
import torch
from torch import nn
from transformers import BlipVisionConfig

from captioner.vision import build_tower, see
from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig
from infra.train.recompute import recompute
from infra.train.task import Update
from t2i.conditions.words import WordsConfig
from t2i.nn.weights import initialize
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.mar import MARConfig
from t2i.priors.sampling import SamplingConfig
from t2i.protocol import Asked, Space
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.task import build_tokenizer
from t2i.tokenizers.turns import GeneratorTurn
from t2i.tokenizers.vqgan import VQGANConfig


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


class Seen(nn.Module):
    """A captioner's vision tower, whose blocks are gone through by `see`."""

    def __init__(self):
        super().__init__()
        config = BlipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        self.tower = build_tower(config)

    def targets(self, batch):
        return {"square": batch["weight"].sum()}

    def forward(self, batch):
        return {"square": (see(self.tower, batch["images"]).square().mean((1, 2)) * batch["weight"]).sum()}


def tower():
    return Seen(), {"images": torch.randn(3, 3, 32, 32), "weight": torch.ones(3)}


def masked():
    config = MARConfig(width=32, encoder_layers=2, decoder_layers=2, heads=2, buffer=2, head_width=32, head_layers=2)
    model = config.build(Space((4, 4, 4)), ())
    initialize(model, 0)
    batch = {"values": torch.randn(3, 4, 4, 4), "noise_key": torch.arange(3), "step": torch.tensor(0)}
    return model, batch | {"weight": torch.ones(3)}


def tokenizer():
    config = VQGANConfig(channels=16, multipliers=(1, 2), attention_levels=(), groups=4, latent_channels=8,
                         middle_attention=False, quantizer=CodebookConfig(size=16, width=4))  # fmt: skip
    model = GeneratorTurn(build_tokenizer(config), LossConfig())
    initialize(model, 0)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    return model, {"images": images, "weight": torch.ones(2), "step": torch.tensor(0)}


@pytest.mark.parametrize("build", [tower, masked, tokenizer])
def test_every_model_with_blocks_keeps_less(build):
    losses, state, _, kept, _ = run(build, light=False, steps=2)
    light_losses, light_state, _, light_kept, found = run(build, light=True, steps=2)
    assert losses == light_losses
    assert all(torch.equal(state[name], light_state[name]) for name in state)
    assert found > 1
    assert light_kept < 0.7 * kept, (light_kept, kept)


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
