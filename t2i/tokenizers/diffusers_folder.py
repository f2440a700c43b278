"""Folders of diffusers' `VQModel` and `AutoencoderKL`: what their config.json tells, and how one of ours is written."""

import json
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.layouts import to_diffusers
from t2i.tokenizers.scale import Scale
from t2i.tokenizers.vqgan import VQGAN, VQGANConfig

VQ, KL = "VQModel", "AutoencoderKL"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
GROUPS, SCALING = 32, 0.18215  # what diffusers takes where a folder tells nothing
# What a config.json tells of networks that are like ours, or does not tell.
USUAL = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_type": "group", "lookup_from_codebook": False}


def config_of(told: Mapping[str, Any]) -> VQGANConfig:
    """The config of a folder's config.json; ValueError where it is of another kind than ours."""
    for name, wanted in USUAL.items():
        if told.get(name, wanted) != wanted:
            raise ValueError(f"It is a tokenizer of another kind: its {name} is {told[name]}, not {wanted}.")
    widths, downs = told["block_out_channels"], told["down_block_types"]
    ups = [name.replace("DownEncoder", "UpDecoder") for name in reversed(downs)]
    if {*downs} - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"} or list(told["up_block_types"]) != ups:
        raise ValueError(f"It is a tokenizer of another kind: its blocks are {downs} and {told['up_block_types']}.")
    pointwise = {told.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv")}
    if len(pointwise) > 1:
        raise ValueError(
            "It is a tokenizer of another kind: of use_quant_conv and use_post_quant_conv only one is true."
        )
    latent, quantizer = told["latent_channels"], GaussianConfig(width=told["latent_channels"])
    if told["_class_name"] == VQ:
        quantizer = CodebookConfig(size=told["num_vq_embeddings"], width=told.get("vq_embed_dim") or latent)
    channels = gcd(*widths)
    return VQGANConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=told["layers_per_block"],
        attention_levels=tuple(level for level, name in enumerate(downs) if name.startswith("Attn")),
        middle_attention=told.get("mid_block_add_attention", True),
        groups=told.get("norm_num_groups", GROUPS),
        latent_channels=latent,
        quantizer=quantizer,
        pointwise=pointwise.pop(),
    )


def scale_of(told: Mapping[str, Any]) -> Scale | None:
    """The scale that a folder's config.json tells; None where latents stay as they are.

    Its pipelines take (latents - shift_factor) * scaling_factor or, by channel, with latents_mean in the shift's place
    and each factor over latents_std.
    """
    factor, shift = told.get("scaling_factor", SCALING), told.get("shift_factor") or 0.0
    means, deviations = told.get("latents_mean"), told.get("latents_std")
    if means is None and deviations is None:
        scale = Scale(factor=(float(factor),), shift=(float(shift),))
        return None if scale == Scale() else scale
    if means is None or deviations is None or shift:
        raise ValueError("It tells of latents_mean and latents_std one alone, or a shift_factor beside them.")
    if {len(means), len(deviations)} != {told["latent_channels"]} or not all(each > 0 for each in deviations):
        raise ValueError(
            f"It has {told['latent_channels']} channels of latents, but {means} and {deviations} tell others."
        )
    return Scale(factor=tuple(factor / each for each in deviations), shift=tuple(map(float, means)))


def save_diffusers(tokenizer: VQGAN, folder: str) -> None:
    """Write a tokenizer, with its scale, into a local folder; ValueError where diffusers has none like it."""
    place, told = Path(folder), told_of(tokenizer.config, tokenizer.scale or Scale())
    state = {name: value.contiguous() for name, value in to_diffusers(tokenizer.state_dict()).items()}
    place.mkdir(parents=True, exist_ok=True)
    save_file(state, place / WEIGHTS[0], metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(told, indent=2, allow_nan=False) + "\n")


def told_of(config: VQGANConfig, scale: Scale) -> dict[str, Any]:
    """What config.json says of a tokenizer."""
    levels, quantizer = range(len(config.multipliers)), config.quantizer
    attends = ["Attn" * (level in config.attention_levels) for level in levels]
    told: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": [f"{attend}DownEncoderBlock2D" for attend in attends],
        "up_block_types": [f"{attend}UpDecoderBlock2D" for attend in reversed(attends)],
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.middle_attention,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
    }
    if isinstance(quantizer, GaussianConfig) and quantizer.width == config.latent_channels:
        told |= {"_class_name": KL, "use_quant_conv": config.pointwise, "use_post_quant_conv": config.pointwise}
        return told | _scale_told(scale)
    plain = isinstance(quantizer, CodebookConfig) and not (quantizer.normalize or quantizer.linear or quantizer.ema)
    if not plain or not config.pointwise:
        raise ValueError(f"diffusers has no tokenizer with a quantizer like {quantizer}.")
    if len(scale.factor) != 1 or any(scale.shift):
        raise ValueError(f"diffusers' {VQ} has one scaling_factor and no shift, but this one's scale is {scale}.")
    told |= {"_class_name": VQ, "num_vq_embeddings": quantizer.size, "vq_embed_dim": quantizer.width}
    return told | {"scaling_factor": scale.factor[0]}


def _scale_told(scale: Scale) -> dict[str, Any]:
    if len(scale.factor) != 1:
        told = {"latents_mean": list(scale.shift), "latents_std": [1 / factor for factor in scale.factor]}
        return {"scaling_factor": 1.0, **told}
    return {"scaling_factor": scale.factor[0], "shift_factor": scale.shift[0] or None}
