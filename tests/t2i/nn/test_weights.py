"""First weights: the law of every fill, and that a weight depends on seed and name alone."""

import math

import pytest
import torch
from torch import nn

from t2i.nn.weights import (
    begins,
    constant,
    fill_own,
    identity,
    initialize,
    lecun,
    normal,
    truncated,
    uniform,
    xavier,
)
from t2i.random import keys_of


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.up = begins(nn.Linear(width, 4 * width), weight=normal(0.02))
        self.norm = nn.LayerNorm(width)
        self.out = begins(nn.Linear(4 * width, width, bias=False), weight=constant(0.0))
        begins(self, scale=constant(1.0))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 32, padding_idx=0)
        self.picture = nn.Conv2d(3, 32, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))


def made(seed=0, **settings):
    initialize(model := Model(**settings), seed)
    return model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_a_function_of_seed_and_name():
    torch.manual_seed(0)
    first = made()
    torch.manual_seed(1)
    assert same(made(), first)
    larger = made(blocks=3)
    assert same({name: larger[name] for name in first}, first)
    other = made(seed=1)
    random = [name for name in first if first[name].std() > 0]
    assert len(random) == 7
    for name in random:
        assert not torch.equal(other[name], first[name]), name
        for further in random:
            if further != name and first[further].shape == first[name].shape:
                assert not torch.equal(first[further], first[name]), (name, further)


def test_a_model_built_in_parts_is_the_same():
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    seen = set()
    for name, module in reversed(list(model.named_modules())):
        fill_own(module, name, 0, seen)
    assert same(model.state_dict(), made())


def test_layers_that_say_nothing_begin_as_pytorch_has_them():
    """Same law as the constructor's: the quantiles of both agree."""
    torch.manual_seed(0)
    layers = {
        "linear": nn.Linear(60, 300),
        "conv": nn.Conv2d(16, 40, 3, groups=2),
        "transposed": nn.ConvTranspose2d(16, 40, 3),
        "embedding": nn.Embedding(200, 60),
    }
    was = {name: values.detach().clone() for name, values in nn.ModuleDict(layers).named_parameters()}
    initialize(nn.ModuleDict(layers), 3)
    points = torch.linspace(0.05, 0.95, 19)
    for name, values in nn.ModuleDict(layers).named_parameters():
        values = values.detach()
        assert not torch.equal(values, was[name])
        bound = float(was[name].abs().max())
        spread = 6 * bound / math.sqrt(values.numel())
        assert torch.allclose(values.quantile(points), was[name].quantile(points), atol=spread), name
        if name != "embedding.weight":
            assert float(values.abs().max()) == pytest.approx(bound, rel=0.05 if values.numel() > 200 else 0.3)
    for norm in (nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3), nn.BatchNorm2d(3)):
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.fill_(7.0)
        initialize(norm, 0)
        assert norm.weight.tolist() == [1, 1, 1]
        assert getattr(norm, "bias", None) is None or norm.bias.tolist() == [0, 0, 0]


def test_what_stands_for_padding_is_nought():
    assert not made()["words.weight"][0].any()
    assert made()["words.weight"][1:].all()


def test_fills_have_their_law():
    key, shape, count = keys_of([0]), (100, 30, 10), 30_000
    for fill, deviation in (
        (normal(0.5), 0.5),
        (uniform(0.3), 0.3 / math.sqrt(3)),
        (xavier(2.0), 2 * math.sqrt(2 / 400)),
        (lecun(3.0), 3 / math.sqrt(3 * 300)),
        (truncated(0.5), 0.5 * 0.879626),  # the deviation of N(0, 1) within two of its own
    ):
        values = fill(key, shape)
        assert values.shape == shape
        assert values.dtype == torch.float32
        assert float(values.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * count))
        assert float(values.mean()) == pytest.approx(0, abs=4 * deviation / math.sqrt(count))
    assert 0.99 < float(truncated(0.5)(key, shape).abs().max()) <= 1
    assert torch.equal(identity()(key, (3, 3)), torch.eye(3))
    assert constant(2.0)(key, (2,)).tolist() == [2, 2]


def test_tied_weights_are_filled_once_and_frozen_parts_are_not():
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False), "tower": nn.Linear(4, 4)})
    model["head"].weight = model["words"].weight
    tower = model["tower"].requires_grad_(False).weight.clone()
    initialize(model, 0, skip=["tower"])
    alone = nn.ModuleDict({"words": nn.Embedding(9, 4)})
    initialize(alone, 0)
    assert torch.equal(model["head"].weight, alone["words"].weight)
    assert torch.equal(model["tower"].weight, tower)


def test_a_parameter_of_which_nothing_is_said_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Parameter(torch.zeros(3))

    with pytest.raises(ValueError, match=r"how part\.start of a Odd begins"):
        initialize(nn.ModuleDict({"part": Odd()}), 0)
    with pytest.raises(ValueError, match="has no parameter wieght"):
        begins(nn.Linear(2, 2), wieght=constant(0.0))


def test_a_buffer_begins_where_somebody_says_how_and_not_in_what_was_loaded():
    class Followed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(5, 3))
            self.register_buffer("counts", torch.zeros(5))
            begins(self, codes=normal(1.0))

    model = nn.ModuleDict({"one": Followed(), "loaded": Followed()})
    initialize(model, 0, ["loaded"])
    again = nn.ModuleDict({"one": Followed()})
    initialize(again, 0)
    assert torch.equal(model["one"].codes, again["one"].codes)
    assert model["one"].codes.std() > 0.3
    assert not model["one"].counts.any()
    assert not model["loaded"].codes.any()
