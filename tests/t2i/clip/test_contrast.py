"""CLIP's loss against the field's numbers and plain autograd, however the rows of the global batch are shared out."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from t2i.clip.contrast import LIMIT, contrast, leash

IMAGES = normalize(torch.tensor([[1, 0], [0, 1], [1, 1]]).double(), dim=1)
TEXTS = normalize(torch.tensor([[1, 0.1], [0.2, 1], [0.5, 0.6]]).double(), dim=1)


def mean(images, texts, scale, kinds=None):
    kinds = torch.arange(len(images)) if kinds is None else kinds
    return contrast(images, texts, images, texts, kinds, 0, torch.tensor(scale, dtype=images.dtype)) / len(images)


def plain(images, texts, scale, kinds):
    """The sum over all rows, as figure 3 of the paper has it, with equal texts left out."""
    logits = scale * images @ texts.T
    logits = logits.masked_fill((kinds[:, None] == kinds) & ~torch.eye(len(kinds), dtype=torch.bool), -torch.inf)
    right = torch.arange(len(kinds))
    return (cross_entropy(logits, right, reduction="sum") + cross_entropy(logits.T, right, reduction="sum")) / 2


def test_the_number_that_open_clip_and_transformers_give():
    ours = mean(IMAGES, TEXTS, 1 / 0.07)
    assert float(ours) == pytest.approx(0.063581951, abs=1e-8)
    assert float(image_text_contrastive_loss(IMAGES @ TEXTS.T / 0.07)) == pytest.approx(float(ours), abs=1e-8)


@pytest.mark.parametrize("rows", [1, 2, 7, 600])
def test_logits_of_zero_are_a_draw_among_all(rows):
    across = torch.eye(2)
    ours = mean(across[:1].expand(rows, 2), across[1:].expand(rows, 2), 30.0)
    assert float(ours) == pytest.approx(math.log(rows), abs=1e-5)


@given(st.integers(1, 12), st.integers(1, 5), st.sets(st.integers(1, 11), max_size=3), st.integers(0, 2**31))
def test_values_and_gradients_of_parts_add_up(rows, kinds, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (normalize(torch.randn(rows, 6, generator=generator), dim=1).double() for _ in range(2))
    kind, scale = torch.randint(kinds, (rows,), generator=generator), torch.tensor(7.0, dtype=torch.float64)
    whole = [each.clone().requires_grad_() for each in (images, texts, scale)]
    wanted = plain(*whole, kind)
    wanted.backward()
    parts, value = [each.clone().requires_grad_() for each in (images, texts, scale)], 0.0
    ends = [0, *sorted(cut for cut in cuts if cut < rows), rows]
    for first, end in pairwise(ends):
        loss = contrast(parts[0][first:end], parts[1][first:end], images, texts, kind, first, parts[2])
        loss.backward()
        value += loss.item()
    assert value == pytest.approx(wanted.item(), rel=1e-9, abs=1e-9)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_rows_are_gone_through_in_blocks():
    """More rows than are looked at at once, by one who holds few."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(700, 4, generator=generator), dim=1) for _ in range(2))
    kinds = torch.arange(700) // 2
    whole = [each.clone().requires_grad_() for each in (images, texts)]
    plain(*whole, 5.0, kinds).backward()
    own = [each[300:302].clone().requires_grad_() for each in (images, texts)]
    contrast(*own, images, texts, kinds, 300, torch.tensor(5.0)).backward()
    for ours, theirs in zip(own, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad[300:302], rtol=1e-4, atol=1e-6)


def test_who_holds_no_row_adds_nothing():
    images = IMAGES.clone().requires_grad_()
    loss = contrast(images[:0], images[:0], IMAGES, TEXTS, torch.arange(3), 3, torch.tensor(9.0).double())
    loss.backward()
    assert loss.item() == 0
    assert not images.grad.any()


def test_equal_texts_are_no_wrong_partners():
    alike = torch.zeros(3, dtype=torch.int64)
    assert float(mean(IMAGES, TEXTS[:1].expand(3, 2), 50.0, alike)) == pytest.approx(0, abs=1e-6)
    assert float(mean(IMAGES, TEXTS[:1].expand(3, 2), 50.0)) > 1


@given(st.floats(-3, 9))
def test_a_scale_is_led_back_from_beyond_its_limit_alone(value):
    log_scale = torch.tensor(value, requires_grad=True)
    pull = leash(log_scale)
    pull.backward()
    assert pull.item() == 0
    assert float(log_scale.grad) == pytest.approx(max(0.0, value - LIMIT), abs=1e-6)
