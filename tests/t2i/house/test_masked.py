"""MAR, small: a denoising head a token in a masked prior, with one share of masked tokens a step."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from t2i.conditions.labels import LabelConfig
from t2i.diffusion.process import Process
from t2i.diffusion.schedules import Betas
from t2i.nn.weights import initialize
from t2i.priors.mar import MARConfig, MARSampling
from t2i.protocol import Asked, Space
from tests.t2i.house.spot import OPTIM, Spot, asker, falls, moments, normal, trained

LABEL = LabelConfig(labels=("left", "right"), drop=0.1)
SPACE = Space((1, 2, 3))
MEANS = (-0.6, 0.6)
SHARED, OWN = 0.5, 0.2  # deviations of what all tokens of a row share, and of each token's own
TINY = MARConfig(
    width=32, encoder_layers=1, decoder_layers=1, heads=2, buffer=2, head_width=48, head_layers=2, repeats=2,
    least_masked=0.1, process=Process(schedule=Betas(shape="cosine", steps=100), prediction="x0"),
)  # fmt: skip


def data(rows, draw):
    """x = mean of the label + what the row shares + each token's own."""
    label = rows % 2
    values = np.array(MEANS)[label][:, None] + SHARED * normal(rows, 0, 1) + OWN * normal(rows, 1, 6)
    return {
        "values": values.reshape(-1, *SPACE.shape).astype(np.float32),
        "label": label.astype(np.int64),
        "dropped_label": draw("drop/label") < 0.1,
    }


def learner():
    return TINY.build(SPACE, (LABEL,))


def spot():
    return Spot(learner, data, {"prior": replace(OPTIM, lr=3e-3)})


@pytest.fixture(scope="module")
def prior():
    return trained(spot(), steps=400, batch=64)


@pytest.mark.long
def test_it_learns(prior):
    assert falls(prior[1], "prior/error", to=0.8)


@pytest.mark.long
def test_what_it_draws_has_the_known_moments(prior):
    """Tokens are drawn one after another, each given those before: else their covariance would be lost."""
    told = {"class_label": [LABEL.labels[row % 2] for row in range(3000)]}
    seeds = list(range(3000))
    drawn = prior[0].sample(asker(LABEL)(told, seeds), seeds, MARSampling(rounds=3, steps=25))
    assert drawn.shape == (3000, *SPACE.shape)
    for label in range(2):
        mean, covariance = moments(drawn[label::2].flatten(1))
        torch.testing.assert_close(mean, torch.full((6,), MEANS[label]).double(), rtol=0, atol=0.12)
        beside = covariance[~torch.eye(6, dtype=torch.bool)]
        assert beside.mean() == pytest.approx(SHARED**2, rel=0.35)  # those of one round do not see each other
        assert beside.min() > 0.5 * SHARED**2
        assert covariance.diagonal().mean() == pytest.approx(SHARED**2 + OWN**2, rel=0.3)


@pytest.mark.long
def test_a_row_depends_on_its_seed_alone(prior):
    sampling = MARSampling(rounds=2, steps=10, guidance=2.0)
    told = {"class_label": ["left", "right", "left"]}
    together = prior[0].sample(asker(LABEL)(told, [1, 2, 3]), [1, 2, 3], sampling)
    alone = prior[0].sample(asker(LABEL)({"class_label": ["right"]}, [2]), [2], sampling)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert prior[0].sample(asker(LABEL)(told, [1, 2, 3]), [1, 2, 3], MARSampling(rounds=9, steps=5)).isfinite().all()


def test_one_share_of_masked_tokens_a_step():
    """From a normal of mean 1 and deviation 0.25, cut at 0.7 and 1; the same for all rows and workers."""
    prior = MARConfig(width=8, encoder_layers=0, decoder_layers=0, heads=1, head_width=8, head_layers=1).build(
        Space((1, 16, 16)), ()
    )
    counts = np.array([prior.masked_at(step) for step in range(4000)])
    assert counts.min() >= math.ceil(0.7 * 256)
    assert counts.max() <= 256
    a = 1.2
    phi, low = (
        (1 / math.sqrt(2 * math.pi), math.exp(-a * a / 2) / math.sqrt(2 * math.pi)),
        0.5 * math.erfc(a / math.sqrt(2)),
    )
    mean = 1 + 0.25 * (low * 0 + (phi[1] - phi[0])) / (0.5 - low)
    assert counts.mean() / 256 == pytest.approx(mean, abs=0.006)
    batch = {"weight": torch.tensor([1.0, 1.0, 0.0]), "step": torch.tensor(7)}
    assert {name: float(count) for name, count in prior.targets(batch).items()} == dict.fromkeys(
        ("error", "bound"), 2.0 * prior.masked_at(7)
    )


@pytest.mark.parametrize(
    ("sizes", "total", "head"),
    [
        ({}, 207_924_768, 35_749_920),
        ({"width": 1024, "encoder_layers": 16, "decoder_layers": 16, "heads": 16, "head_width": 1280, "head_layers": 8},
         478_326_304, 72_230_432),
    ],
)  # fmt: skip
def test_published_sizes(sizes, total, head):
    with torch.device("meta"):
        labels = LabelConfig(labels=tuple(map(str, range(1000))))
        prior = MARConfig(**sizes).build(Space((16, 16, 16)), (labels,))
    assert sum(parameter.numel() for parameter in prior.parameters()) == total
    assert sum(parameter.numel() for parameter in prior.head.parameters()) == head


def test_what_it_does_not_know_it_does_not_see():
    """A masked token's value changes nothing that is said."""
    prior = learner()
    initialize(prior, 3)
    tokens = torch.randn(2, 6, 1)
    order = torch.tensor([[2, 0, 1, 5, 4, 3], [1, 2, 0, 3, 4, 5]])
    told = prior.conditions.asked(Asked(2, {"label": torch.tensor([0, 1])}))
    before = prior.said(told, tokens, order, 2, 2)
    changed = tokens.clone()
    changed[0, [0, 2]] += 1.0
    changed[1, [1, 2]] += 1.0
    assert torch.equal(before, prior.said(told, changed, order, 2, 2))
    changed[0, 1] += 1.0
    assert not torch.allclose(before[0], prior.said(told, changed, order, 2, 2)[0])


def test_tokens_come_back_as_latents():
    prior = MARConfig(width=8, encoder_layers=0, decoder_layers=0, heads=1, patch=2).build(Space((3, 4, 6)), ())
    latents = torch.randn(2, 3, 4, 6)
    tokens = prior.to_tokens(latents)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(prior.to_latents(tokens), latents)
