import pytest
import torch
import transformers

from captioner import vision
from captioner.vision import build_tower, portion, see

pytestmark = pytest.mark.family()


def small(**sizes):
    return transformers.BlipVisionConfig(patch_size=16, num_attention_heads=4, intermediate_size=128, **sizes)


@pytest.mark.parametrize("size", [64, (32, 96)], ids=["square", "wide"])
def test_sees_what_transformers_sees(size):
    torch.manual_seed(0)
    config = transformers.BlipVisionConfig(
        image_size=size,
        patch_size=16,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
    )
    tower = build_tower(config).eval()
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(3, 3, height, width)
    with torch.no_grad():
        theirs = tower(pixel_values=images).last_hidden_state
        assert torch.allclose(see(tower, images), theirs, atol=1e-5)


def test_gradients_are_those_of_transformers():
    torch.manual_seed(0)
    tower, images = build_tower(small(image_size=32, hidden_size=32, num_hidden_layers=2)), torch.randn(2, 3, 32, 32)
    tower(pixel_values=images).last_hidden_state.square().sum().backward()
    theirs = {name: weight.grad.clone() for name, weight in tower.named_parameters() if weight.grad is not None}
    tower.zero_grad()
    see(tower, images).square().sum().backward()
    for name, weight in tower.named_parameters():
        if name in theirs:
            assert weight.grad is not None
            assert torch.allclose(weight.grad, theirs[name], rtol=1e-3, atol=1e-4), name


def test_a_portion_is_bounded_by_numbers_not_rows():
    assert portion(torch.empty(500, 577, 768, device="meta")) == 4
    assert portion(torch.empty(500, 17, 128, device="meta")) > 500
    assert portion(torch.empty(2, 3, 20_000, 20_000, device="meta")) == 1
    assert portion(torch.empty(0, 17, 128)) >= 1


def test_portions_change_nothing(make_captioner, pixels, monkeypatch):
    captioner = make_captioner()
    with torch.no_grad():
        whole = captioner.encode(pixels)
        monkeypatch.setattr(vision, "_CACHED", 1)
        assert torch.allclose(captioner.encode(pixels), whole, atol=1e-6)
