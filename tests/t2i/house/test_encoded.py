"""Wuerstchen's way, small: a condition's encoder learns with its prior, and becomes the space of another one."""

import numpy as np
import pytest
import torch
from torch import nn

from t2i.chain import Link, paint
from t2i.conditions.encoded import Encoded, EncodedRows
from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.diffusion.prior import DiffusionPrior, DiffusionSampling
from t2i.diffusion.process import Process
from t2i.diffusion.schedules import Flow
from t2i.protocol import Space
from t2i.tokenizers.from_condition import FromCondition
from tests.t2i.house.spot import Net, Spot, asker, falls, moments, normal, trained

LABEL = LabelConfig(labels=("dark", "bright"), drop=0.0)
SIZE, WIDTH = (2, 2), 64
PIXELS, SEMANTIC = Space((3, *SIZE), bound=1.0), Space((2,))
MEANS, DEVIATION = (-0.4, 0.4), 0.2


class Small(nn.Module):
    """A picture to two numbers of about unit size."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(PIXELS.places, 2)

    def forward(self, images):
        return torch.tanh(self.layers(images.flatten(1)))


class Flat(nn.Module):
    """`Net` on pictures."""

    def __init__(self):
        super().__init__()
        self.net = Net(PIXELS.places)
        self.hears = self.net.hears

    def forward(self, x, t, told):
        return self.net(x.flatten(1), t, told).view_as(x)


class EncodedConfig:
    name, drop, reads = "semantic", 0.0, ("pixels",)

    def rows(self, folder):
        return EncodedRows(self.name, SIZE)

    def build(self, width, space):
        return Encoded(self.name, Small(), SIZE, SEMANTIC, width, space)


def pictures(rows):
    """One brightness a picture, of its label's mean, and a little noise; rounded to bytes."""
    values = np.array(MEANS)[rows % 2] + DEVIATION * normal(rows, 0, 1)[:, 0]
    values = values[:, None, None, None] + 0.02 * normal(rows, 1, *PIXELS.shape)
    return np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def picture_data(rows, draw):
    pixels = pictures(rows)
    return {"values": (pixels / 127.5 - 1).astype(np.float32), "semantic_pixels": pixels}


def picture_prior():
    conditions = Conditions((EncodedConfig(),), WIDTH, PIXELS, {"vector"})
    return DiffusionPrior(Flat(), Process(schedule=Flow(), prediction="velocity"), PIXELS, conditions)


def picture_spot():
    return Spot(picture_prior, picture_data)


def semantic_prior():
    conditions = Conditions((LABEL,), WIDTH, SEMANTIC, {"vector"})
    return DiffusionPrior(Net(2), Process(schedule=Flow(), prediction="velocity"), SEMANTIC, conditions)


def test_an_encoder_that_learned_is_the_space_of_a_prior_that_is_drawn_first():
    second, losses = trained(picture_spot(), steps=300)
    assert falls(losses, "error", to=0.5)  # without what the encoder says, half would be left
    tokenizer = FromCondition(second, "semantic")
    assert tokenizer.space((512, 512)) == SEMANTIC

    def semantic_data(rows, draw):
        images = torch.from_numpy(pictures(rows)).float() / 127.5 - 1
        return {"values": tokenizer.encode(images).numpy(), "label": (rows % 2).astype(np.int64)}

    first, losses = trained(Spot(semantic_prior, semantic_data), steps=300)
    assert falls(losses, "error", to=0.8)
    sampling = DiffusionSampling(steps=15, sampler="heun")
    links = [
        Link(first, asker(LABEL), sampling, tokenizer, id="semantic"),
        Link(second, asker(EncodedConfig()), sampling, id="pixels", given={"semantic": "semantic"}),
    ]
    told = {"class_label": [LABEL.labels[row % 2] for row in range(1000)]}
    painted = paint(links, told, list(range(1000)))
    assert painted.pictures is None  # neither has a way back to pixels: the values are them
    for label in range(2):
        mean, covariance = moments(painted.values[label::2].mean((1, 2, 3))[:, None])
        assert float(mean) == pytest.approx(MEANS[label], abs=0.07)
        assert float(covariance.sqrt()) == pytest.approx(DEVIATION, rel=0.35)
    assert painted.values.flatten(1).std(1).mean() < 0.15  # a picture has one brightness
    of_a_picture = torch.full((4, 3, *SIZE), 0.3)
    again = paint(links[1:], {}, [1, 2, 3, 4], {"semantic": tokenizer.encode(of_a_picture)}).values
    torch.testing.assert_close(again.mean((1, 2, 3)), torch.full((4,), 0.3), rtol=0, atol=0.15)


def test_it_says_planes_of_values_that_have_rows():
    condition = Encoded("seen", nn.Conv2d(3, 5, 4, 4), (8, 12), Space((5, 2, 3)), 16, Space((4, 8, 12)))
    pixels = torch.from_numpy(
        EncodedRows("seen", (8, 12))({"pixels": [np.zeros((16, 24, 3), np.uint8)] * 2}, None)["seen_pixels"]
    )
    told = condition({"seen_pixels": pixels}, torch.tensor([False, True]))
    assert told.planes.shape == (2, 5, 8, 12)
    assert told.planes[1].abs().max() == 0 < told.planes[0].abs().max()
    values = condition.encode(torch.full((2, 3, 16, 24), -1.0))  # brought to its size
    same = condition({"seen": values}, torch.tensor([False, True]))
    torch.testing.assert_close(same.planes, told.planes)


def test_only_encoders_become_tokenizers():
    prior = semantic_prior()
    with pytest.raises(ValueError, match="'label' has no encoder"):
        FromCondition(prior, "label")
    with pytest.raises(ValueError, match="does not decode"):
        FromCondition(picture_prior(), "semantic").decode(torch.zeros(1, 2))
