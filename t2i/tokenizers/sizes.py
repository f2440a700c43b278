"""How large the model is whose published weights lie there, from their shapes by the names of their authors.

A name that is not there is a KeyError. What no shape tells is as in the authors' code: the norms have 32 groups, a head
of ViT-VQGAN is 64 wide.
"""

import re

from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.dvae import DVAEConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.layouts import Weights
from t2i.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from t2i.tokenizers.vit_vqgan import TowerConfig, ViTVQGANConfig
from t2i.tokenizers.vqgan import VQGANConfig

GROUPS, HEAD = 32, 64


def of_compvis(weights: Weights) -> VQGANConfig:
    """Of taming-transformers and latent-diffusion; what has no codes, but says means and variances, is a Gaussian."""
    channels, multipliers = _pyramid(weights)
    levels = range(len(multipliers))
    quantizer: CodebookConfig | GaussianConfig
    if "quantize.embedding.weight" in weights:
        quantizer = _codebook(weights, "quantize.embedding.weight")
    else:
        quantizer = GaussianConfig(width=weights["post_quant_conv.weight"].shape[1])
    return VQGANConfig(
        channels=channels,
        multipliers=multipliers,
        blocks=_count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_levels=tuple(level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in weights),
        middle_attention="encoder.mid.attn_1.q.weight" in weights,
        groups=GROUPS,
        latent_channels=weights["decoder.conv_in.weight"].shape[1],
        quantizer=quantizer,
    )


def of_1d_tokenizer(weights: Weights) -> MaskGITVQGANConfig:
    """Of the MaskGIT-VQGAN."""
    channels, multipliers = _pyramid(weights)
    return MaskGITVQGANConfig(
        channels=channels,
        multipliers=multipliers,
        blocks=_count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        groups=GROUPS,
        quantizer=_codebook(weights, "quantize.embedding.weight"),
    )


def of_enhancing_transformers(weights: Weights) -> ViTVQGANConfig:
    """Of a ViT-VQGAN."""

    def tower(coder: str) -> TowerConfig:
        weight = weights[f"{coder}.transformer.layers.0.0.fn.to_qkv.weight"]
        layers = _count(weights, coder + r"\.transformer\.layers\.(\d+)\.")
        return TowerConfig(layers=layers, width=weight.shape[1], heads=weight.shape[0] // 3 // HEAD, head_width=HEAD)

    return ViTVQGANConfig(
        patch=weights["encoder.to_patch_embedding.0.weight"].shape[-1],
        encoder=tower("encoder"),
        decoder=tower("decoder"),
        quantizer=_codebook(weights, "quantizer.embedding.weight", normalize=True),
    )


def of_dalle(weights: Weights) -> DVAEConfig:
    """Of a dVAE, whose parts' names are behind "encoder." and "decoder."."""
    channels = weights["encoder.blocks.input.w"].shape[0]
    groups = range(1, 1 + _count(weights, r"encoder\.blocks\.group_(\d)\."))
    widths = [weights[f"encoder.blocks.group_{group}.block_1.res_path.conv_4.w"].shape[0] for group in groups]
    size, width = (weights[f"{name}.w"].shape[0] for name in ("encoder.blocks.output.conv", "decoder.blocks.input"))
    return DVAEConfig(
        channels=channels,
        multipliers=tuple(each // channels for each in widths),
        blocks=_count(weights, r"encoder\.blocks\.group_1\.block_(\d)\."),
        quantizer=GumbelConfig(size=size, width=width),
    )


def _pyramid(weights: Weights) -> tuple[int, tuple[int, ...]]:
    """Channels of the first convolution, and how many times as many each level has."""
    channels = weights["encoder.conv_in.weight"].shape[0]
    levels = range(_count(weights, r"encoder\.down\.(\d+)\."))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    return channels, tuple(width // channels for width in widths)


def _codebook(weights: Weights, name: str, normalize: bool = False) -> CodebookConfig:
    size, width = weights[name].shape
    return CodebookConfig(size=size, width=width, normalize=normalize)


def _count(weights: Weights, pattern: str) -> int:
    """How many different numbers stand at a place of the names."""
    return len({found[1] for name in weights if (found := re.match(pattern, name))})
