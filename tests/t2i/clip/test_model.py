"""CLIP's towers are transformers' own, with the published sizes; first weights are functions of seed and name."""

import math

import numpy as np
import pytest
import torch
import transformers

from infra.train.optim import OptimConfig, parameter_groups
from t2i.clip import model as module
from t2i.clip.contrast import LIMIT
from t2i.clip.model import CLIP, CLIPConfig, TowerConfig, build
from t2i.clip.words import CLIPWords
from t2i.nn.weights import initialize
from tests.t2i.clip import tiny

pytestmark = pytest.mark.family("make")
COUNTS = {"clip_b32": 151_277_313, "clip_b16": 149_620_737, "clip_l14": 427_616_513, "clip_l14_336": 427_944_193}


@pytest.fixture(scope="module")
def clip():
    model = CLIP(tiny.config())
    initialize(model, 3)
    return model


def batch_of(numbers, **more):
    arrays = tiny.task().collate({"row": numbers}, lambda salt: np.zeros(len(numbers)))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**batch, "weight": torch.ones(len(numbers)), **more}


@pytest.mark.parametrize("make", COUNTS)
def test_published_sizes_are_exact(make):
    with torch.device("meta"):
        model = build(getattr(module, make)())
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[make]


def test_the_config_that_is_written_is_the_published_one():
    """What transformers gives by itself is openai/clip-vit-base-patch32."""
    with torch.device("meta"):
        ours, theirs = build(module.clip_b32()).config, transformers.CLIPConfig()
    for part in ("text_config", "vision_config"):
        told, wanted = (getattr(config, part).to_dict() for config in (ours, theirs))
        assert told | {"pad_token_id": 1} == wanted | {"pad_token_id": 1}  # ours is what the tokenizer pads with
    assert ours.logit_scale_init_value == pytest.approx(theirs.logit_scale_init_value, abs=1e-4)


def test_the_loss_is_that_of_transformers(clip):
    batch = batch_of([0, 1, 2, 7, 11])
    ours = clip(batch)["contrastive"] / clip.targets(batch)["contrastive"]
    pixels = (batch["pixels"].float() / 255 - clip.mean) / clip.std
    theirs = clip.clip(input_ids=batch["ids"], pixel_values=pixels, return_loss=True).loss
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad(ours, clip.parameters())
    for name, mine, other in zip(
        dict(clip.named_parameters()), got, torch.autograd.grad(theirs, clip.parameters()), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_of_weight_0_change_nothing(clip):
    few, more = batch_of([0, 5, 9]), batch_of([0, 3, 5, 9, 10])
    more["weight"] = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    losses = [clip(batch)["contrastive"] for batch in (few, more)]
    torch.testing.assert_close(*losses)
    assert float(clip.targets(more)["contrastive"]) == 3
    grads = [torch.autograd.grad(loss, clip.parameters()) for loss in losses]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    nothing = batch_of([0, 1], weight=torch.zeros(2))
    assert clip(nothing)["contrastive"].item() == 0


def test_what_is_said_twice_is_not_wrong(clip):
    """Rows 1 and 17 are of one kind, and so are their texts."""
    batch = batch_of([1, 17])
    assert batch["text"][0] == batch["text"][1]
    assert clip(batch)["contrastive"].item() == pytest.approx(0, abs=1e-5)


def test_a_text_does_not_depend_on_how_far_it_is_padded(clip):
    ids = torch.from_numpy(CLIPWords(tiny.words(), tiny.LENGTH)(["red over blue"])[0])
    longer = torch.cat([ids, ids[:, -1:].expand(1, 3)], dim=1)
    torch.testing.assert_close(clip.texts(ids), clip.texts(longer))


def test_first_weights_are_of_seed_and_name(clip):
    torch.manual_seed(7)
    with torch.device("meta"):
        other = CLIP(tiny.config())
    other = other.to_empty(device="cpu")
    initialize(other, 3)
    for name, weight in clip.named_parameters():
        assert torch.equal(weight, dict(other.named_parameters())[name]), name
    assert clip.clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert clip.clip.text_model.embeddings.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    first = clip.clip.vision_model.encoder.layers[0]
    assert first.self_attn.q_proj.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert first.mlp.fc2.weight.std().item() == pytest.approx((32 * 2) ** -0.5, rel=0.1)
    assert not first.mlp.fc1.bias.any()


def test_the_scale_is_at_most_100_and_does_not_decay(clip):
    groups = parameter_groups(clip, OptimConfig(weight_decay=0.2))
    (group,) = [group for group in groups if any(each is clip.clip.logit_scale for each in group["params"])]
    assert group["weight_decay"] == 0
    model = CLIP(tiny.config())
    initialize(model, 3)
    batch, losses = batch_of([0, 1, 2, 3]), []
    for log_scale in (LIMIT, LIMIT + 2):
        model.clip.logit_scale.data.fill_(log_scale)
        losses.append(model(batch)["contrastive"].item())
    assert losses[0] == pytest.approx(losses[1])
    optimizer = torch.optim.Adam([model.clip.logit_scale], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch)["contrastive"].backward()
        optimizer.step()
    assert model.clip.logit_scale.item() < LIMIT + 0.05
    model.clip.logit_scale.data.fill_(LIMIT + 2)
    kept = model.published().logit_scale
    assert (kept.ndim, kept.item()) == (0, pytest.approx(LIMIT))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 30}, "does not divide"),
        ({"length": 2}, "at least 3 tokens"),
        ({"vocabulary_size": 500}, "all bytes"),
        ({"width": 0}, "width of at least 1"),
    ],
)
def test_configs_check_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**fields)


def test_towers_check_themselves():
    with pytest.raises(ValueError, match="heads divide"):
        TowerConfig(width=10, layers=1, heads=4)
