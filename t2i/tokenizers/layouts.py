"""How published tokenizers call their weights, and how these are called here.

Each function takes the weights of a published file, by name, and returns ours. A name that it does not know is a
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
