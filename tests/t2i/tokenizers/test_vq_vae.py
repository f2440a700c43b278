import pytest
import torch

from t2i.nn.weights import initialize
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.vq_vae import VQVAE, VQVAEConfig, vq_vae_imagenet


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_size_by_hand():
    with torch.device("meta"):
        model = VQVAE(vq_vae_imagenet())
    block = (256 * 256 * 9 + 256) + (256 * 256 + 256)
    encoder = (3 * 256 * 16 + 256) + (256 * 256 * 16 + 256) + 2 * block
    decoder = 2 * block + (256 * 256 * 16 + 256) + (256 * 3 * 16 + 3)
    assert (count(model.encoder), count(model.decoder)) == (encoder, decoder) == (2_373_120, 2_372_867)
    ends = (256 * 64 + 64) + (64 * 256 + 256)
    assert count(model) == encoder + ends + 512 * 64 + decoder == 4_811_843


def test_imagenet_at_128_pixels_is_32_by_32_codes():
    model = vq_vae_imagenet().build()
    codes = model.encode(torch.zeros(1, 3, 128, 128))
    pictures = model.decode(codes)
    assert codes.shape == (1, *model.space((128, 128)).shape) == (1, 32, 32)
    assert model.codebook_size == 512
    assert pictures.shape == (1, 3, 128, 128)


def test_a_code_sees_what_its_layers_reach():
    """Two 4x4 convolutions of stride 2 see 10 pixels, and each 3x3 four positions of four pixels more."""
    model = VQVAEConfig(channels=8, quantizer=CodebookConfig(size=8, width=4)).build()
    initialize(model, 0)
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    model.hidden(images)[0, :, 8, 8].sum().backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 <= 10 + 2 * 2 * 4
    assert rows.min() >= 32 - 19
    assert rows.max() <= 32 + 4 + 18


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        VQVAEConfig(levels=0)
    with pytest.raises(ValueError, match="do not divide"):
        VQVAEConfig().grid((30, 32))
