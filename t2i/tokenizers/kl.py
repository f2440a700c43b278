"""The published KL autoencoders of latent diffusion: VQGAN's network around a Gaussian (arXiv 2112.10752).

Their training weighs sums over a row's pixels, `LossConfig(reduction="sum", kl=1e-6)`, with a critic from step 50,001.
"""

from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.vqgan import VQGANConfig


def kl_f4() -> VQGANConfig:
    """Latent diffusion's KL-f4, of OpenImages: 55,312,063 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return _kl((1, 2, 4), 3)


def kl_f8() -> VQGANConfig:
    """Latent diffusion's KL-f8, which is Stable Diffusion's: 83,653,863 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return _kl((1, 2, 4, 4), 4)


def kl_f16() -> VQGANConfig:
    """Latent diffusion's KL-f16, of OpenImages: 69,610,963 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return _kl((1, 1, 2, 2, 4), 16, attention_levels=(4,))


def kl_f32() -> VQGANConfig:
    """Latent diffusion's KL-f32, of OpenImages: 103,880,131 parameters.

    arXiv 2112.10752; its sizes are those of its authors' code, CompVis/latent-diffusion.
    """
    return _kl((1, 1, 2, 2, 4, 4), 64, attention_levels=(4, 5))


def _kl(multipliers: tuple[int, ...], width: int, attention_levels: tuple[int, ...] = ()) -> VQGANConfig:
    return VQGANConfig(
        multipliers=multipliers,
        attention_levels=attention_levels,
        latent_channels=width,
        quantizer=GaussianConfig(width=width),
    )
