"""ViT-VQGAN: two vision transformers around codes of few dimensions on the unit sphere (arXiv 2110.04627).

Shapes: B rows, D width of a transformer, S = h * w patches, C width of a code. Positions are worked out for the
grid at hand, so no weight depends on how many patches there are.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from t2i.nn.vit import ViTBlock, sincos
from t2i.nn.weights import begins, xavier
from t2i.pixels import from_unit, patches, to_unit
from t2i.tokenizers import likelihood
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A vision transformer's sizes."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    head_width: int = 64  # heads * head_width need not be the width

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.head_width) < 1 or self.width < 4 or self.width % 4:
            raise ValueError("A tower needs layers, heads and a head_width of at least 1, and a width that 4 divides.")


@dataclass(frozen=True, kw_only=True)
class ViTVQGANConfig:
    """The defaults are the small one.

    The paper weighs l2 1, the logit-Laplace term, the perceptual one and a critic that does not adapt 0.1 each; the
    public code has no logit-Laplace term.
    """

    patch: int = 8  # pixels a side that one code stands for
    encoder: TowerConfig = field(default_factory=TowerConfig)
    decoder: TowerConfig = field(default_factory=TowerConfig)
    quantizer: QuantizerConfig = field(default_factory=lambda: CodebookConfig(size=8192, width=32, normalize=True))
    # The decoder says mu of a logit-Laplace distribution whose b is 1, as the paper's loss wants it. The public code
    # says pixels.
    logits: bool = False

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ValueError(f"A patch has at least 1 pixel a side, but patch={self.patch}.")

    def build(self) -> "ViTVQGAN":
        """The tokenizer, with fresh weights."""
        return ViTVQGAN(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Codes (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return patches(size, self.patch)


def vit_vqgan_small() -> ViTVQGANConfig:
    """ViT-VQGAN, small, of ImageNet at 256 pixels: 50,908,195 parameters.

    arXiv 2110.04627; its sizes are those of the public code, thuanz123/enhancing-transformers.
    """
    return ViTVQGANConfig()


def vit_vqgan_base() -> ViTVQGANConfig:
    """ViT-VQGAN, base, of ImageNet at 256 pixels: 170,664,483 parameters.

    arXiv 2110.04627; its sizes are those of the public code, thuanz123/enhancing-transformers.
    """
    base = TowerConfig(layers=12, width=768, heads=12)
    return ViTVQGANConfig(encoder=base, decoder=base)


def vit_vqgan_large() -> ViTVQGANConfig:
    """ViT-VQGAN with a small encoder and a large decoder, of ImageNet at 256 pixels: 613,487,907 parameters.

    arXiv 2110.04627; its sizes are those of the public code, thuanz123/enhancing-transformers.
    """
    return ViTVQGANConfig(decoder=TowerConfig(layers=32, width=1280, heads=16))


class ViTVQGAN(Autoencoder):
    """Images (B, 3, H, W) in [-1, 1] to codes (B, H / patch, W / patch) and back; in between pixels are in [0, 1]."""

    def __init__(self, config: ViTVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = config.quantizer.build()
        patch, inner, outer = config.patch, config.encoder.width, config.decoder.width
        self.from_pixels = begins(nn.Conv2d(3, inner, patch, patch), weight=xavier())
        self.encoder, self.to_codes = Tower(config.encoder), nn.Linear(inner, config.quantizer.takes)
        self.from_codes, self.decoder = nn.Linear(config.quantizer.width, outer), Tower(config.decoder)
        self.to_pixels = begins(nn.ConvTranspose2d(outer, 3, patch, patch), weight=xavier())

    @property
    def logits(self) -> bool:  # type: ignore[override]
        """Whether the decoder says logits."""
        return self.config.logits

    @property
    def last_layer(self) -> torch.Tensor:
        """Of the pixels."""
        return self.to_pixels.weight

    def hidden(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's output, (B, C, h, w) or logits."""
        x_BDhw = self.from_pixels(to_unit(images))
        grid = (x_BDhw.shape[2], x_BDhw.shape[3])
        codes_BSC = self.to_codes(self.encoder(x_BDhw.flatten(2).transpose(1, 2), grid))
        return codes_BSC.transpose(1, 2).unflatten(2, grid)

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """Images from code vectors, not clamped; or logits (B, 3, H, W)."""
        grid = (vectors.shape[2], vectors.shape[3])
        x_BSD = self.decoder(self.from_codes(vectors.flatten(2).transpose(1, 2)), grid)
        output = self.to_pixels(x_BSD.transpose(1, 2).unflatten(2, grid))
        return output if self.logits else from_unit(output)

    def pictures(self, output: torch.Tensor) -> torch.Tensor:
        """Images of what `reconstruct` returned, not clamped."""
        return likelihood.pictures(output) if self.logits else output


class Tower(nn.Module):
    """Fixed positions, blocks with tanh between their linear layers, a norm: (B, S, D) in and out."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self._width = config.width
        self.blocks = nn.ModuleList(
            ViTBlock(
                config.width,
                config.heads,
                head_width=config.head_width,
                qkv_bias=False,
                activation=torch.tanh,
                eps=1e-5,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x_BSD: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x_BSD = x_BSD + sincos(grid, self._width, x_BSD.device)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.norm(x_BSD)
