"""GAN-CLS, small: a generator with two critics in one turn, and texts that are partnered over the global batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infra.train.optim import OptimConfig
from t2i.gans.matching import Matching
from t2i.partners import mismatched
from tests.t2i.house.spot import Spot, moments, normal, trained

A = np.array([[1.0, -0.5], [0.3, 0.9]])
TEXTS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
NOISE = 2


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(NOISE + 2, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2))
        self.leave = nn.Linear(48, 2)

    def forward(self, noise, texts):
        return self.leave(self.layers(torch.cat([noise, texts], dim=1)))


class Critic(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
        self.leave = nn.Linear(width, 1)

    def forward(self, pictures, texts):
        return self.leave(self.layers(torch.cat([pictures, texts], dim=1)))


def data(rows, draw):
    texts = TEXTS[rows % 4]
    values = texts @ A.T + 0.4 * normal(rows, 0, 2)
    return {"values": values.astype(np.float32), "text": texts, "draw_partner": draw("partner").astype(np.float32)}


def learner():
    return Matching(Generator(), [Critic(32), Critic(64)], NOISE)


def spot():
    optim = OptimConfig(lr=1e-3, betas=(0.0, 0.99), warmup_steps=5, schedule="constant", ema_decay=0.995, clip_norm=0)
    return Spot(learner, data, {"generator": optim, "critic": replace(optim, lr=4e-3)}, whole_weights=True)


def test_turns_hold_their_own_parameters_alone():
    generator, critic = learner().turns()
    names = [{name for name, _ in turn.module.named_parameters()} for turn in (generator, critic)]
    assert all(name.startswith("generator.") for name in names[0])
    assert {name.split(".")[1] for name in names[1]} == {"0", "1"}
    assert generator.mixes_rows
    assert critic.mixes_rows


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_a_partner_has_another_text(numbers, random):
    texts = torch.tensor(numbers)[:, None].expand(-1, 3).float()
    partner = mismatched(texts, torch.tensor([random.random() for _ in numbers]))
    for row, other in enumerate(partner.tolist()):
        if len(set(numbers)) == 1:
            assert other == -1
        else:
            assert numbers[other] != numbers[row]


def test_partners_are_drawn_evenly():
    texts = torch.tensor([0, 1, 1, 2]).repeat(1000)[:, None].float()
    partner = mismatched(texts, torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    of_first = texts[partner[::4], 0]
    assert float((of_first == 1).float().mean()) == pytest.approx(2 / 3, abs=0.06)


def test_a_row_without_another_text_meets_none():
    module = learner()
    batch = {
        "weight": torch.ones(3), "text": torch.ones(3, 2), "draw_partner": torch.rand(3), "values": torch.zeros(3, 2),
        "noise_key": torch.arange(3), "step": torch.tensor(0),
    }  # fmt: skip
    sums = module(batch)
    assert sums["between_0"] == 0 < sums["match_0"]
    assert module.turns()[1].module(batch)["critic_1"] > 0


@pytest.mark.long
def test_it_draws_what_the_texts_say():
    module, losses = trained(spot(), steps=1000)
    assert {"generator/match_0", "generator/between_1", "critic/critic_0", "critic/critic_1"} <= losses[-1].keys()
    noise = torch.randn(1500, NOISE, generator=torch.Generator().manual_seed(0))
    for text in torch.from_numpy(TEXTS):
        mean, covariance = moments(module.generator(noise, text.expand(1500, -1)))
        torch.testing.assert_close(mean, torch.tensor(A @ text.numpy()), rtol=0, atol=0.12)
        torch.testing.assert_close(covariance, 0.16 * torch.eye(2).double(), rtol=0, atol=0.08)
