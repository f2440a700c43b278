"""What the published networks say, against other people's implementations, and how their weights are called."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from t2i.nn.vit import ViTBlock, sincos
from t2i.nn.weights import initialize
from t2i.pixels import scale
from t2i.tokenizers import kl, layouts, likelihood, sizes, vqgan
from t2i.tokenizers.autoencoder import Noise
from t2i.tokenizers.dvae import DVAEConfig, dalle_dvae
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.maskgit_vqgan import MaskGITVQGANConfig, maskgit_vqgan
from t2i.tokenizers.turns import GeneratorTurn
from t2i.tokenizers.vit_vqgan import TowerConfig, ViTVQGANConfig, vit_vqgan_base, vit_vqgan_large, vit_vqgan_small
from t2i.tokenizers.vqgan import VQGANConfig
from tests.t2i.test_tokenizers import LOSSES, PYRAMID, TOKENIZERS, build, close, images

pytestmark = pytest.mark.family("name")
NAMES = ["vit vqgan", "vit vqgan, logits", "dvae", "maskgit vqgan"]
GAUSSIAN = {
    "kl": VQGANConfig(**PYRAMID, quantizer=GaussianConfig(width=3)),
    "kl, no pointwise convolutions": VQGANConfig(**PYRAMID, quantizer=GaussianConfig(width=8), pointwise=False),
}
FIRST_STAGES = {
    name: (getattr(module, name), layouts.of_compvis, sizes.of_compvis)
    for module, names in {
        vqgan: ("vqgan_f16_1024", "vqgan_f16_16384", "ldm_vq_f4", "ldm_vq_f8", "ldm_vq_f8_256", "ldm_vq_f16"),
        kl: ("kl_f4", "kl_f8", "kl_f16", "kl_f32"),
    }.items()
    for name in names
}
LAYOUTS = {
    "vit_vqgan_small": (vit_vqgan_small, layouts.of_enhancing_transformers, sizes.of_enhancing_transformers),
    "vit_vqgan_base": (vit_vqgan_base, layouts.of_enhancing_transformers, sizes.of_enhancing_transformers),
    "vit_vqgan_large": (vit_vqgan_large, layouts.of_enhancing_transformers, sizes.of_enhancing_transformers),
    "dalle_dvae": (dalle_dvae, layouts.of_dalle, sizes.of_dalle),
    "maskgit_vqgan": (maskgit_vqgan, layouts.of_1d_tokenizer, sizes.of_1d_tokenizer),
    **FIRST_STAGES,
}


def published(name):
    shapes = json.loads((Path(__file__).parents[2] / f"data/layouts/{name}.json").read_text())["shapes"]
    return {each: torch.empty(shape, device="meta") for each, shape in shapes.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_of_the_authors_has_its_place_and_every_place_its_weight(name):
    make, converted, sized = LAYOUTS[name]
    assert sized(published(name)) == make()
    with torch.device("meta"):
        ours = make().build().state_dict()
    got = converted(published(name))
    assert {each: weight.shape for each, weight in got.items()} == {each: weight.shape for each, weight in ours.items()}
    left_out = {each for each in published(name) if "pos_embedding" in each}
    assert len(published(name)) - len(left_out) == len(got)
    with pytest.raises(ValueError, match=r"No weight of .* is called 'encoder.nonsense.weight'"):
        converted(published(name) | {"encoder.nonsense.weight": torch.empty(1)})


def test_what_is_trained_beside_a_tokenizer_is_no_part_of_it():
    weights = {"loss.discriminator.0.weight": torch.empty(1), "pre_quant.bias": torch.empty(1)}
    assert list(layouts.of_enhancing_transformers(weights)) == ["to_codes.bias"]
    beside = {"loss.logvar": torch.empty(()), "model_ema.decay": torch.empty(()), "quant_conv.bias": torch.empty(1)}
    assert list(layouts.of_compvis(beside)) == ["to_codes.bias"]


def test_names_of_diffusers_go_and_come():
    with torch.device("meta"):
        ours = kl.kl_f16().build().state_dict()
    theirs = layouts.to_diffusers(ours)
    assert {"quant_conv.weight", "post_quant_conv.bias"} < theirs.keys()
    assert list(layouts.of_diffusers(theirs)) == list(ours)
    with pytest.raises(ValueError, match=r"No weight of .* is called 'quantizer.mix.weight'"):
        layouts.to_diffusers({"quantizer.mix.weight": torch.empty(1)})


def batch(name):
    rows = images()
    return {"images": rows, "weight": torch.ones(3), "step": torch.tensor(0), "noise_key": torch.arange(3)}


def trained(name, steps, autocast=False):
    """The turn, and the loss at each step."""
    losses, heard = LOSSES.get(name, LossConfig(distance="l2")), []
    turn = GeneratorTurn(build({**TOKENIZERS, **GAUSSIAN}[name]), losses)
    optimizer = torch.optim.Adam(turn.parameters(), lr=3e-3)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sums = turn(batch(name) | {"step": torch.tensor(step)})
        optimizer.zero_grad()
        total = sum(weight * sums[each] for each, weight in losses.weights().items() if each in sums)
        total.backward()
        optimizer.step()
        heard.append(total.item())
    return turn, heard


# A key's bias adds the same to all that a query compares, so that its gradient is zero but for rounding.
NO_MATTER = "to_k.bias"
FROZEN = {"vqgan, linear codebook": ["quantizer.vectors"]}  # seen through a matrix, which learns


@pytest.mark.parametrize("name", [*TOKENIZERS, *GAUSSIAN])
def test_every_weight_learns(name):
    turn, _ = trained(name, 3)
    gradients = {each: weight.grad for each, weight in turn.tokenizer.named_parameters()}
    keys = [each for each in gradients if each.endswith(NO_MATTER)]
    still = [each for each, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert [each for each in still if each not in keys] == FROZEN.get(name, [])
    for each in keys:
        queries = gradients[each.replace("to_k", "to_q")]
        assert gradients[each].abs().max() < 1e-3 * queries.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_down_in_16_bits(name):
    _, heard = trained(name, 24, autocast=True)
    assert all(math.isfinite(each) for each in heard)
    assert sum(heard[-4:]) < sum(heard[:4])


@pytest.mark.parametrize("name", NAMES)
def test_no_row_hears_another(name):
    tokenizer, pixels = build(TOKENIZERS[name]), scale(images()).requires_grad_()
    rebuilt = tokenizer.reconstruct(tokenizer.quantize(pixels, Noise(torch.arange(3), 0)).vectors)
    (pulled,) = torch.autograd.grad(rebuilt[1].square().sum(), pixels)
    assert pulled[1].any()
    assert not pulled[[0, 2]].any()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_may_differ_from_one_batch_to_the_next(name):
    tokenizer = build(TOKENIZERS[name])
    for size in ((4, 16), (8, 8), (6, 2)):
        codes = tokenizer.encode(scale(images(size=size)))
        assert codes.shape[1:] == tokenizer.space(size).shape == (size[0] // 2, size[1] // 2)
        assert tokenizer.decode(codes).shape == (3, 3, *size)


def test_the_block_is_that_of_torch():
    width, heads = 16, 4
    ours = ViTBlock(width, heads, qkv_bias=False, activation=torch.tanh, eps=1e-5)
    initialize(ours, 0)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, torch.tanh, batch_first=True, norm_first=True)
    pairs = {
        "self_attn.in_proj_weight": ours.qkv.weight,
        "self_attn.in_proj_bias": torch.zeros(3 * width),
        "self_attn.out_proj.weight": ours.out.weight,
        "self_attn.out_proj.bias": ours.out.bias,
        "linear1.weight": ours.up.weight,
        "linear1.bias": ours.up.bias,
        "linear2.weight": ours.down.weight,
        "linear2.bias": ours.down.bias,
        "norm1.weight": ours.norm_attention.weight,
        "norm1.bias": ours.norm_attention.bias,
        "norm2.weight": ours.norm_mlp.weight,
        "norm2.bias": ours.norm_mlp.bias,
    }
    layer.load_state_dict(pairs)
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    close(ours(x), layer(x))


def test_heads_need_not_share_the_width():
    block = ViTBlock(20, 3, head_width=8)
    initialize(block, 0)
    assert block.qkv.weight.shape == (72, 20)
    assert block(torch.ones(1, 2, 20)).shape == (1, 2, 20)


def test_positions_are_those_of_diffusers():
    for side, width in ((32, 512), (3, 16)):
        theirs = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
        close(sincos((side, side), width), theirs.float())
    wide = sincos((2, 5), 8).view(2, 5, 8)
    assert torch.equal(wide, sincos((7, 9), 8).view(7, 9, 8)[:2, :5]), "a place is the same in any grid"


def test_the_encoder_of_dall_e_is_that_of_flava():
    config = DVAEConfig(channels=64, quantizer=GumbelConfig(size=512, width=16))
    flava = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=64, vocab_size=512)).eval()
    tokenizer = build(config)
    weights = {}
    for name, weight in flava.state_dict().items():
        name = name.replace(".group.", ".").replace("res_path.path", "res_path")
        weights["encoder." + name.replace(".weight", ".w").replace(".bias", ".b")] = weight
    missing, unknown = tokenizer.load_state_dict(layouts.of_dalle(weights), strict=False)
    assert not unknown
    assert not [name for name in missing if name.startswith("encoder.")]
    pixels = scale(images(size=(16, 24)))
    logits = flava.blocks(likelihood.squeezed(pixels))
    torch.testing.assert_close(tokenizer.hidden(pixels), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokenizer.encode(pixels), flava.get_codebook_indices(likelihood.squeezed(pixels)))


def test_the_parts_of_dall_e_have_their_sizes():
    with torch.device("meta"):
        tokenizer, flava = dalle_dvae().build(), FlavaImageCodebook(FlavaImageCodebookConfig())
    count = {name: sum(each.numel() for each in part.parameters()) for name, part in tokenizer.named_children()}
    assert count["encoder"] == sum(each.numel() for each in flava.parameters()) == 53_786_240
    assert count["decoder"] + count["quantizer"] == 43_829_766


@pytest.mark.parametrize("name", ["vit vqgan, logits", "dvae"])
def test_logits_become_pictures(name):
    tokenizer = build(TOKENIZERS[name])
    output = torch.full((1, 6, 2, 2), 3.0)
    assert tokenizer.logits
    assert tokenizer.pictures(output)[0, 0, 0, 0] == pytest.approx(((1 / (1 + math.exp(-3)) - 0.1) / 0.8) * 2 - 1)
    assert tokenizer.decode(tokenizer.encode(scale(images()))).abs().max() <= 1


def test_who_says_pixels_cannot_be_asked_for_logits():
    assert not build(TOKENIZERS["vit vqgan"]).logits
    with pytest.raises(ValueError, match="says pixels, not logits"):
        GeneratorTurn(build(TOKENIZERS["vit vqgan"]), LossConfig(logit_laplace=0.1))


def test_wrong_sizes_are_told():
    for wrong in ({"width": 6}, {"layers": 0}, {"heads": 0}, {"head_width": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="A tower needs"):
            TowerConfig(**wrong)
    with pytest.raises(ValueError, match="patch=0"):
        ViTVQGANConfig(patch=0)
    for wrong in ({"channels": 6}, {"channels": 0}, {"multipliers": ()}, {"multipliers": (1, 0)}, {"blocks": 0}):
        with pytest.raises(ValueError, match="A dVAE needs"):
            DVAEConfig(**wrong)
    for wrong in ({"channels": 0}, {"multipliers": ()}, {"multipliers": (1, 0)}, {"blocks": 0}, {"groups": 0}):
        with pytest.raises(ValueError, match="at least one level"):
            MaskGITVQGANConfig(**wrong)
    with pytest.raises(ValueError, match="30 channels do not divide into 32"):
        MaskGITVQGANConfig(channels=30)
    for make in (vit_vqgan_small, dalle_dvae):
        assert make().grid((256, 64)) == (32, 8)
        with pytest.raises(ValueError, match="do not divide into patches of 8 pixels"):
            make().grid((256, 60))
    assert replace(maskgit_vqgan(), blocks=1).grid((256, 64)) == (16, 4)
