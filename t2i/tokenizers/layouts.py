"""How published tokenizers call their weights, and how these are called here.

Each `of_` takes the weights of a published file, by name, and returns ours. A name that it does not know is a
ValueError; what is worked out here, or is no part of the tokenizer, is left out. Weights may lie on the meta device.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

Weights = Mapping[str, torch.Tensor]
# Of a name: how it looks, and what it is here, or None, if it has no place here; the first that fits counts.
Rules = Sequence[tuple[str, str | Callable[[re.Match], str] | None]]


def of_enhancing_transformers(theirs: Weights) -> dict[str, torch.Tensor]:
    """A `ViTVQGAN` of a checkpoint of thuanz123/enhancing-transformers, whose fixed positions are worked out here."""
    return _renamed(theirs, _VIT_VQGAN, "a ViT-VQGAN of thuanz123/enhancing-transformers")


def of_dalle(theirs: Weights) -> dict[str, torch.Tensor]:
    """A `DVAE` of openai/DALL-E's `encoder.pkl` and `decoder.pkl`, each name behind "encoder." or "decoder.".

    Their decoder begins with a convolution of one-hot codes: its columns are our code vectors.
    """
    ours = _renamed(theirs, _DVAE, "a dVAE of openai/DALL-E")
    first = {name: weight[:, :, 0, 0].T.contiguous() for name, weight in ours.items() if name == "quantizer.vectors"}
    return ours | first


def of_1d_tokenizer(theirs: Weights) -> dict[str, torch.Tensor]:
    """A `MaskGITVQGAN` of the tokenizer of bytedance/1d-tokenizer's RAR, `maskgit-vqgan-imagenet-f16-256.bin`."""
    return _renamed(theirs, _MASKGIT_VQGAN, "the MaskGIT-VQGAN of bytedance/1d-tokenizer")


def of_compvis(theirs: Weights) -> dict[str, torch.Tensor]:
    """A `VQGAN` of CompVis/taming-transformers or CompVis/latent-diffusion, with codes or with a Gaussian.

    Their decoder counts its levels from the finest. What they train beside it (LPIPS, a critic, averages) is left out.
    """
    found = [re.match(r"decoder\.up\.(\d+)\.", name) for name in theirs]
    levels = 1 + max((int(each[1]) for each in found if each), default=0)
    return _flat(_renamed(theirs, _compvis(levels), "a VQGAN of CompVis"))


def of_diffusers(theirs: Weights) -> dict[str, torch.Tensor]:
    """A `VQGAN` of diffusers' `VQModel` or `AutoencoderKL`, also by the names of before its version 0.18."""
    return _flat(_renamed(theirs, _DIFFUSERS, "a VQModel or AutoencoderKL of diffusers"))


def to_diffusers(ours: Weights) -> dict[str, torch.Tensor]:
    """The weights of a `VQGAN`, as diffusers calls them."""
    return _renamed(ours, _TO_DIFFUSERS, "ours that diffusers has")


_TOWER = r"(encoder|decoder)\.transformer\."
_LAYER = _TOWER + r"layers\.(\d+)\."
_VIT_VQGAN: Rules = (
    (r"encoder\.to_patch_embedding\.0\.(\w+)", r"from_pixels.\1"),
    (r"decoder\.to_pixel\.1\.(\w+)", r"to_pixels.\1"),
    (r"pre_quant\.(\w+)", r"to_codes.\1"),
    (r"post_quant\.(\w+)", r"from_codes.\1"),
    (r"quantizer\.embedding\.weight", "quantizer.vectors"),
    (_LAYER + r"0\.norm\.(\w+)", r"\1.blocks.\2.norm_attention.\3"),
    (_LAYER + r"0\.fn\.to_qkv\.(\w+)", r"\1.blocks.\2.qkv.\3"),
    (_LAYER + r"0\.fn\.to_out\.(\w+)", r"\1.blocks.\2.out.\3"),
    (_LAYER + r"1\.norm\.(\w+)", r"\1.blocks.\2.norm_mlp.\3"),
    (_LAYER + r"1\.fn\.net\.0\.(\w+)", r"\1.blocks.\2.up.\3"),
    (_LAYER + r"1\.fn\.net\.2\.(\w+)", r"\1.blocks.\2.down.\3"),
    (_TOWER + r"norm\.(\w+)", r"\1.norm.\2"),
    (r"encoder\.en_pos_embedding|decoder\.de_pos_embedding", None),
    (r"loss\..*", None),
)

_BLOCK = r"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\."
_MIDDLE = r"(encoder|decoder)\.mid\.(\d+)\."
_MASKGIT_VQGAN: Rules = (
    (r"encoder\.conv_in\.(\w+)", r"encoder.from_pixels.\1"),
    (r"encoder\.conv_out\.(\w+)", r"encoder.to_codes.\1"),
    (r"decoder\.conv_in\.(\w+)", r"decoder.from_codes.\1"),
    (r"decoder\.conv_out\.(\w+)", r"decoder.to_pixels.\1"),
    (r"quantize\.embedding\.weight", "quantizer.vectors"),
    (r"(encoder|decoder)\.norm_out\.(\w+)", r"\1.norm.\2"),
    (r"decoder\.up\.(\d+)\.upsample_conv\.(\w+)", r"decoder.upward.\1.\2"),
    (_BLOCK + r"((?:norm|conv)[12])\.(\w+)", r"\1.levels.\2.\3.\4.\5"),
    (_BLOCK + r"nin_shortcut\.(\w+)", r"\1.levels.\2.\3.shortcut.\4"),
    (_MIDDLE + r"((?:norm|conv)[12])\.(\w+)", r"\1.middle.\2.\3.\4"),
)

_KINDS = {"w": "weight", "b": "bias"}


def _in_dvae(part: str, found: re.Match) -> str:
    """A part of a block; theirs count from 1."""
    coder, group, block, *number, kind = found.groups()
    numbers = "".join(f".{int(each) - 1}" for each in number)
    return f"{coder}.levels.{int(group) - 1}.{int(block) - 1}.{part}{numbers}.{_KINDS[kind]}"


_DVAE_BLOCK = r"(encoder|decoder)\.blocks\.group_(\d)\.block_(\d)\."
_DVAE: Rules = (
    (r"encoder\.blocks\.input\.(w|b)", lambda found: f"encoder.from_pixels.{_KINDS[found[1]]}"),
    (r"encoder\.blocks\.output\.conv\.(w|b)", lambda found: f"encoder.to_codes.{_KINDS[found[1]]}"),
    (r"decoder\.blocks\.output\.conv\.(w|b)", lambda found: f"decoder.to_pixels.{_KINDS[found[1]]}"),
    (r"decoder\.blocks\.input\.w", "quantizer.vectors"),
    (r"decoder\.blocks\.input\.b", "decoder.bias"),
    (_DVAE_BLOCK + r"res_path\.conv_(\d)\.(w|b)", partial(_in_dvae, "convs")),
    (_DVAE_BLOCK + r"id_path\.(w|b)", partial(_in_dvae, "shortcut")),
)

# What our VQGAN's parts are called there. Its encoder and decoder are diffusers' own.
_AROUND = (
    (r"quant_conv\.(\w+)", r"to_codes.\1"),
    (r"post_quant_conv\.(\w+)", r"from_codes.\1"),
    (r"quantize\.embedding\.weight", "quantizer.vectors"),
)
_BEFORE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DIFFUSERS: Rules = (
    *_AROUND,
    (
        r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)",
        lambda found: f"{found[1]}.{_BEFORE[found[2]]}.{found[3]}",
    ),
    (r"((?:en|de)coder\..*)", r"\1"),
)
_TO_DIFFUSERS: Rules = (
    (r"to_codes\.(\w+)", r"quant_conv.\1"),
    (r"from_codes\.(\w+)", r"post_quant_conv.\1"),
    (r"quantizer\.vectors", "quantize.embedding.weight"),
    (r"((?:en|de)coder\..*)", r"\1"),
)

_STACKS = {"block": "resnets", "attn": "attentions"}
_PARTS = {"nin_shortcut": "conv_shortcut", "norm": "group_norm", "proj_out": "to_out.0"}
_PARTS |= {"q": "to_q", "k": "to_k", "v": "to_v"}


def _compvis(levels: int) -> Rules:
    """Of CompVis's networks with so many levels."""

    def level_of(found: re.Match) -> str:
        coder, way, number = found.groups()[:3]
        return f"{coder}.{way}_blocks.{number if way == 'down' else levels - 1 - int(number)}"

    def in_level(found: re.Match) -> str:
        stack, number, part, kind = found.groups()[3:]
        return f"{level_of(found)}.{_STACKS[stack]}.{number}.{_PARTS.get(part, part)}.{kind}"

    def in_middle(found: re.Match) -> str:
        coder, stack, number, part, kind = found.groups()
        return f"{coder}.mid_block.{_STACKS[stack]}.{int(number) - 1}.{_PARTS.get(part, part)}.{kind}"

    level = r"(encoder|decoder)\.(down|up)\.(\d+)\."
    return (
        *_AROUND,
        (r"((?:en|de)coder\.conv_(?:in|out)\.\w+)", r"\1"),
        (r"(encoder|decoder)\.norm_out\.(\w+)", r"\1.conv_norm_out.\2"),
        (level + r"(block|attn)\.(\d+)\.(\w+)\.(\w+)", in_level),
        (
            level + r"(?:down|up)sample\.conv\.(\w+)",
            lambda found: f"{level_of(found)}.{found[2]}samplers.0.conv.{found[4]}",
        ),
        (r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(\w+)\.(\w+)", in_middle),
        (r"(?:loss|model_ema)\..*", None),
    )


def _flat(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Attention by 1x1 convolutions is attention by linear layers."""
    return {
        name: weight.flatten(1) if ".attentions." in name and weight.dim() == 4 else weight
        for name, weight in ours.items()
    }


def _renamed(theirs: Weights, rules: Rules, model: str) -> dict[str, torch.Tensor]:
    ours: dict[str, torch.Tensor] = {}
    for name, weight in theirs.items():
        found = ((re.fullmatch(pattern, name), here) for pattern, here in rules)
        fits, here = next((each for each in found if each[0]), (None, None))
        if fits is None:
            raise ValueError(f"No weight of {model} is called {name!r}.")
        if here is not None:
            ours[fits.expand(here) if isinstance(here, str) else here(fits)] = weight
    return ours
