"""The perceptual distance against its formula, and networks that are found or missed."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from t2i.nn.weights import initialize
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.perceptual import LPIPS, ClipDistanceConfig, LPIPSConfig, distance
from t2i.tokenizers.turns import GeneratorTurn

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # places in torchvision's VGG16
WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
SLICES = ((0, 4), (5, 9), (10, 16), (17, 23), (24, 30))
PATCHES = PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=FiniteScalarConfig(levels=(4, 3, 2)))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed, size=16):
    return draws(2, 3, size, size, seed=seed).clamp(-1, 1)


@pytest.fixture(scope="module")
def state():
    """Random weights by torchvision's names, and the package lpips's linear layers."""
    found = {}
    for number, place in enumerate(CONVOLUTIONS):
        shape = (WIDTHS[number + 1], WIDTHS[number], 3, 3)
        found[f"features.{place}.weight"] = draws(*shape, seed=place) * (2 / (9 * WIDTHS[number])) ** 0.5
        found[f"features.{place}.bias"] = draws(shape[0], seed=place) * 0.1
    for number, width in enumerate((64, 128, 256, 512, 512)):
        found[f"lin{number}.model.1.weight"] = draws(1, width, 1, 1, seed=number).abs()
    return found


def by_hand(state, first, second):
    """Layer by layer, as the paper has it."""
    shift, spread = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    first, second = ((each - shift[:, None, None]) / spread[:, None, None] for each in (first, second))
    total, number = torch.zeros(2), 0
    for place in range(30):
        if place in (4, 9, 16, 23):
            first, second = (functional.max_pool2d(each, 2) for each in (first, second))
        elif place in CONVOLUTIONS:
            told = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
            first, second = (functional.relu(functional.conv2d(each, *told, padding=1)) for each in (first, second))
        if place in (3, 8, 15, 22, 29):
            unit = [each / each.square().sum(1, keepdim=True).sqrt() for each in (first, second)]
            gap = (unit[0] - unit[1]).square() * state[f"lin{number}.model.1.weight"]
            total, number = total + gap.sum(1).mean((1, 2)), number + 1
    return total


def test_lpips_is_its_formula(state):
    network = LPIPS(state)
    first, second = pictures(1), pictures(2)
    torch.testing.assert_close(network(first, second), by_hand(state, first, second), rtol=1e-4, atol=1e-6)
    assert torch.equal(network(first, first), torch.zeros(2))
    assert sum(each.numel() for each in network.parameters()) == 14_714_688 + 1_472
    assert not any(each.requires_grad for each in network.parameters())


def test_one_file_or_several_by_anybodys_names(state, tmp_path):
    wanted = LPIPS(state)(pictures(1), pictures(2))
    save_file(state, tmp_path / "all.safetensors")
    assert torch.equal(LPIPSConfig(weights=f"{tmp_path}/all.safetensors").load()(pictures(1), pictures(2)), wanted)
    several = tmp_path / "several"
    several.mkdir()
    torch.save({name: each for name, each in state.items() if name.startswith("lin")}, several / "vgg.pth")
    sliced = {}
    for number, (start, end) in enumerate(SLICES, start=1):
        for name, each in state.items():
            if name.startswith("features") and start <= int(name.split(".")[1]) < end:
                sliced[name.replace("features", f"net.slice{number}")] = each
    torch.save(sliced, several / "net.pt")
    assert torch.equal(LPIPSConfig(weights=str(several)).load()(pictures(1), pictures(2)), wanted)


def test_what_is_missing_is_told(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights of LPIPS at"):
        LPIPSConfig(weights=str(tmp_path)).load()
    with pytest.raises(ValueError, match=r"1 of the weights of LPIPS, such as lin3\.model\.1\.weight"):
        LPIPS({name: each for name, each in state.items() if name != "lin3.model.1.weight"})
    with pytest.raises(ValueError, match="both perceptual and network"):
        LossConfig(perceptual=1.0)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = str(tmp_path_factory.mktemp("clip"))
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
    return ClipDistanceConfig(model=folder)


def test_clip_is_a_network_too(tower):
    network = tower.load()
    first = pictures(1).requires_grad_()
    found = network(first, pictures(2))
    assert found.shape == (2,)
    assert (found > 0).all()
    found[0].backward()
    assert first.grad[0].abs().sum() > 0
    assert first.grad[1].abs().sum() == 0, "rows do not meet"
    assert torch.equal(network(pictures(1), pictures(1)), torch.zeros(2))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_term_stands_among_the_losses_and_its_network_is_left_alone(tower, reduction):
    losses = LossConfig(perceptual=0.5, network=tower, reduction=reduction)
    turn = GeneratorTurn(PATCHES.build(), losses)
    (told,) = turn.turns()
    assert told.rebuilt == ("perceptual",)
    initialize(turn, 0, told.rebuilt)
    before = [each.clone() for each in turn.perceptual.parameters()]
    images = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"images": images, "weight": torch.tensor([1.0, 0.0]), "step": torch.tensor(0)}
    sums = turn(batch)
    assert sums.keys() == turn.targets(batch).keys() == {"reconstruction", "perceptual"}
    pixels = images.float() / 127.5 - 1
    rebuilt = turn.tokenizer.reconstruct(turn.tokenizer.quantize(pixels).vectors)
    each = 3 * 8 * 8 if reduction == "sum" else 1
    torch.testing.assert_close(sums["perceptual"], turn.perceptual(rebuilt, pixels)[0] * each)
    torch.testing.assert_close(sums["reconstruction"], (rebuilt - pixels)[0].abs().mean() * each)
    sums["perceptual"].backward()
    assert all(each.grad is None for each in turn.perceptual.parameters())
    assert any(each.grad.abs().sum() > 0 for each in turn.tokenizer.parameters() if each.grad is not None)
    assert all(torch.equal(*pair) for pair in zip(before, turn.perceptual.parameters(), strict=True))


def test_the_distance_does_not_know_how_long_vectors_are():
    first, second = draws(2, 5, 3, 3, seed=1), draws(2, 5, 3, 3, seed=2)
    torch.testing.assert_close(distance(first * 7, second), distance(first, second))
    opposite = distance(first, -first)
    torch.testing.assert_close(opposite, torch.full((2,), 4.0))
