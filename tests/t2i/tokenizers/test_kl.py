"""KL autoencoders: their distribution in closed form, and all of them against diffusers'."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.nn.weights import initialize
from t2i.pixels import scale
from t2i.protocol import Space
from t2i.random import keys_of
from t2i.tokenizers import kl
from t2i.tokenizers.autoencoder import Noise
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.gaussian import Gaussian, GaussianConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.scale import Scale
from t2i.tokenizers.task import load_tokenizer, save_tokenizer
from t2i.tokenizers.vqgan import VQGANConfig

pytestmark = pytest.mark.family("latent")
SMALL = {"channels": 8, "groups": 4, "multipliers": (1, 2), "blocks": 1, "latent_channels": 3}
PUBLISHED = {
    "kl_f4": (55_312_063, Space((3, 64, 64))),
    "kl_f8": (83_653_863, Space((4, 32, 32))),
    "kl_f16": (69_610_963, Space((16, 16, 16))),
    "kl_f32": (103_880_131, Space((64, 8, 8))),
}
LATENTS = {
    "kl": VQGANConfig(**SMALL, attention_levels=(), quantizer=GaussianConfig(width=3)),
    "codebook": VQGANConfig(**SMALL, attention_levels=(), quantizer=CodebookConfig(size=16, width=3)),
    "sphere": VQGANConfig(**SMALL, attention_levels=(), quantizer=CodebookConfig(size=16, width=3, normalize=True)),
    "linear": VQGANConfig(**SMALL, attention_levels=(), quantizer=CodebookConfig(size=16, width=3, linear=True)),
    "finite scalar": PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=FiniteScalarConfig(levels=(4, 5, 2))),
}


def build(name, seed=0):
    tokenizer = LATENTS[name].build()
    initialize(tokenizer, seed)
    return tokenizer.eval()


def images(rows=3, size=(8, 12)):
    return scale(torch.randint(256, (rows, 3, *size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8))


def gaussian(width=2):
    return Gaussian(GaussianConfig(width=width))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    with torch.device("meta"):
        tokenizer = getattr(kl, name)().build()
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == PUBLISHED[name][0]
    assert tokenizer.space((256, 256)) == PUBLISHED[name][1]


def test_the_divergence_is_a_sum_over_latents():
    said = gaussian()(torch.linspace(-1, 1, 16).view(1, 4, 2, 2))
    assert said.codes is None
    assert said.losses["kl"].item() == pytest.approx(2.5187783, rel=1e-6)
    assert gaussian()(torch.zeros(2, 4, 3, 3)).losses["kl"].tolist() == [0, 0]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8))
def test_the_divergence_is_torchs(numbers):
    hidden = torch.tensor(numbers).view(1, 4, 1, 2)
    mean, log_variance = (each.double() for each in gaussian().moments(hidden))
    assert -30 <= log_variance.min() <= log_variance.max() <= 20
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum()
    assert gaussian()(hidden).losses["kl"].item() == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)


def test_a_row_is_drawn_by_its_key_and_else_is_the_mean():
    hidden, keys = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0)), keys_of(range(4))
    bottleneck = gaussian()
    mean, log_variance = bottleneck.moments(hidden)
    assert torch.equal(bottleneck(hidden).vectors, mean)
    drawn = bottleneck(hidden, Noise(keys, 0)).vectors
    assert torch.equal(drawn[2:3], bottleneck(hidden[2:3], Noise(keys[2:3], 7)).vectors)
    noise = ((drawn - mean) / (log_variance / 2).exp()).flatten().double()
    assert abs(noise.mean()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.numel())
    assert not torch.equal(drawn, bottleneck(hidden, Noise(keys + 1, 0)).vectors)


def test_it_is_of_32_bits_under_autocast():
    hidden = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        said = gaussian()(hidden, Noise(keys_of([1, 2]), 0))
    assert said.losses["kl"].dtype == torch.float32
    assert torch.equal(said.losses["kl"], gaussian()(hidden.float()).losses["kl"])
    assert said.vectors.dtype == torch.bfloat16


def theirs_of(tokenizer):
    """diffusers' autoencoder with a tokenizer's weights."""
    from diffusers import AutoencoderKL

    other = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], layers_per_block=1, latent_channels=3, norm_num_groups=4,
    )  # fmt: skip
    names = {"to_codes": "quant_conv", "from_codes": "post_quant_conv"}
    state = {
        ".".join([names.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): value
        for name, value in tokenizer.state_dict().items()
    }
    other.load_state_dict(state)
    return other, {**dict.fromkeys(state), **dict(zip(state, tokenizer.state_dict(), strict=True))}


def test_it_is_diffusers_in_values_and_gradients():
    tokenizer = build("kl")
    other, names = theirs_of(tokenizer)
    pictures, keys = images(), keys_of([3, 4, 5])
    said = tokenizer.quantize(pictures, Noise(keys, 0))
    posterior = other.encode(pictures).latent_dist
    torch.testing.assert_close(tokenizer.encode(pictures), posterior.mode())
    torch.testing.assert_close(said.losses["kl"], posterior.kl())
    noise = ((said.vectors - posterior.mean) / posterior.std).detach()
    rebuilt, theirs = tokenizer.reconstruct(said.vectors), other.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(rebuilt, theirs)
    torch.testing.assert_close(
        tokenizer.decode(posterior.mode().detach()), other.decode(posterior.mode()).sample.clamp(-1, 1)
    )
    ours = (rebuilt - pictures).abs().sum() + 1e-6 * said.losses["kl"].sum()
    ours.backward()
    ((theirs - pictures).abs().sum() + 1e-6 * posterior.kl().sum()).backward()
    own = dict(tokenizer.named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(own[names[name]].grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("latent", LATENTS)
def test_latents_go_and_come_back_scaled(latent, tmp_path):
    tokenizer, pictures = build(latent), images()
    space = tokenizer.latent_space((8, 12))
    plain = tokenizer.latents(pictures)
    assert plain.shape == (3, *space.shape)
    assert space.codes == 0
    assert (tokenizer.space((8, 12)) == space) == (latent == "kl")
    picture = tokenizer.decode(plain)
    heard = tokenizer.quantize(pictures).vectors
    torch.testing.assert_close(picture, tokenizer.reconstruct(heard).clamp(-1, 1), rtol=1e-4, atol=1e-5)
    tokenizer.scale = Scale(factor=(0.5, 2.0, 0.25), shift=(0.1, -1.0, 3.0))
    scaled = tokenizer.latents(pictures)
    torch.testing.assert_close(scaled[:, 1], (plain[:, 1] + 1) * 2)
    torch.testing.assert_close(tokenizer.decode(scaled), picture, rtol=1e-3, atol=1e-4)
    save_tokenizer(tokenizer, str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.scale == tokenizer.scale
    assert torch.equal(loaded.latents(pictures), scaled)


def test_a_codebook_quantizes_the_latents_that_it_decodes():
    tokenizer, pictures = build("codebook"), images()
    latents, codes = tokenizer.latents(pictures), tokenizer.encode(pictures)
    near = latents + 1e-6 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tokenizer.decode(near), tokenizer.decode(codes), rtol=1e-3, atol=1e-4)


def test_moments_are_of_the_posterior_and_only_where_there_is_one():
    tokenizer, pictures = build("kl"), images()
    mean, deviation = tokenizer.moments(pictures)
    assert torch.equal(mean, tokenizer.encode(pictures))
    torch.testing.assert_close(deviation, theirs_of(tokenizer)[0].encode(pictures).latent_dist.std)
    tokenizer.scale = Scale(factor=(0.5,), shift=(2.0,))
    scaled = tokenizer.moments(pictures)
    torch.testing.assert_close(scaled[0], (mean - 2) / 2)
    torch.testing.assert_close(scaled[1], deviation / 2)
    with pytest.raises(ValueError, match="Codebook says no distribution"):
        build("codebook").moments(pictures)


def test_a_folder_of_before_has_no_scale(tmp_path):
    save_tokenizer(build("codebook"), str(tmp_path))
    assert not (tmp_path / "scale.json").exists()
    assert load_tokenizer(str(tmp_path)).scale is None


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"factor": (0.0,)}, "above 0"),
        ({"factor": (math.nan,)}, "above 0"),
        ({"shift": (math.inf,)}, "finite"),
        ({"factor": (1.0, 2.0)}, "as many"),
    ],
    ids=["zero", "nan", "inf", "two"],
)
def test_a_scale_that_cannot_be_is_told(told, why):
    with pytest.raises(ValueError, match=why):
        Scale(**told)


def test_a_scale_is_of_as_many_channels_as_values():
    with pytest.raises(ValueError, match="of 2 channels, but values have 3"):
        Scale(factor=(1.0, 2.0), shift=(0.0, 0.0)).to(torch.zeros(1, 3, 2, 2))
    embedding = Scale(factor=(1.0, 2.0), shift=(0.0, 1.0)).to(torch.tensor([[3.0, 3.0]]))
    assert np.array_equal(embedding, [[3.0, 4.0]])
