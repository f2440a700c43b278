"""Published weights of VQGAN's family: as their authors or diffusers keep them, to our config and names, and back.

Read are folders of diffusers' `VQModel` and `AutoencoderKL`, also as `vae` or `vqvae` of a pipeline, and files of
CompVis/taming-transformers and CompVis/latent-diffusion: state dicts (.ckpt, .pt, .pth) and safetensors. No code of a
file runs.
"""

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from t2i.conditions import encoders
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.vqgan import VQGAN, VQGANConfig

State = dict[str, torch.Tensor]

GROUPS = 32  # of the norms of CompVis's networks, which their files do not tell
FOLDERS = ("", "vae", "vqvae")  # of a pipeline, or the model's own
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")  # of files
KINDS = {"VQModel": CodebookConfig}
WITHIN = "first_stage_model."  # the tokenizer of a whole latent diffusion
BESIDE = ("loss.", "model_ema.")  # a critic, LPIPS and averages, in a training's checkpoint


_PARTS = {"to_codes": "quant_conv", "from_codes": "post_quant_conv", "quantizer.vectors": "quantize.embedding.weight"}
_BEFORE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in older folders of diffusers
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """A tokenizer that others trained, by its folder or file, or a folder on s3://.

    A recipe that does not train it (`train: null`) uses it as it is; else training begins from it.
    """

    path: str

    def build(self) -> VQGAN:
        """The tokenizer with its weights; FileNotFoundError or ValueError where it cannot be had."""
        return load_published(self.path)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Positions (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return read_published(self.path)[0].grid(size)


def load_published(path: str) -> VQGAN:
    """The tokenizer at a path, with its weights."""
    config, state = read_published(path)
    tokenizer = VQGAN(config)
    tokenizer.load_state_dict(state)
    return tokenizer


def read_published(path: str) -> tuple[VQGANConfig, State]:
    """The config of a published tokenizer, and its weights by our names, all of which are there."""
    with encoders.fetched(path) if "://" in path else nullcontext(path) as local:
        place = Path(local)
        if place.is_dir():
            config, state = _of_diffusers(place, path)
        elif place.is_file():
            state = _without_beside(_weights(place))
            config = _sizes_of(state, path)
            state = {_ours(name, len(config.multipliers)): value for name, value in state.items()}
        else:
            raise FileNotFoundError(
                f"There is no tokenizer at {path}: give a folder of diffusers, or a file of weights."
            )
    with torch.device("meta"):
        wanted = VQGAN(config).state_dict()
    state = {name: _shaped(value, wanted.get(name)) for name, value in state.items()}
    for told, names in (("lacks", wanted.keys() - state.keys()), ("has, beside ours,", state.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path} {told} {len(names)} weights of a tokenizer like this, such as {min(names)}.")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{name} of {path} is of shape {tuple(value.shape)}, where its sizes say {tuple(wanted[name].shape)}."
            )
    return config, state


def save_diffusers(tokenizer: VQGAN, folder: str) -> None:
    """Write a tokenizer into a local folder as diffusers keeps it; ValueError where diffusers has none like it."""
    config, place = tokenizer.config, Path(folder)
    kind = next((name for name, kind in KINDS.items() if type(config.quantizer) is kind), None)
    if kind is None or getattr(config.quantizer, "normalize", False) or getattr(config.quantizer, "linear", False):
        raise ValueError(f"diffusers has no tokenizer with a quantizer like {config.quantizer}.")
    levels = range(len(config.multipliers))
    attends = ["Attn" * (level in config.attention_levels) for level in levels]
    told: dict[str, Any] = {
        "_class_name": kind,
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
        "scaling_factor": 1.0,
    }
    if kind == "VQModel":
        told |= {"num_vq_embeddings": config.quantizer.size, "vq_embed_dim": config.quantizer.width}
    place.mkdir(parents=True, exist_ok=True)
    state = {_replaced(name, _PARTS): value.contiguous() for name, value in tokenizer.state_dict().items()}
    save_file(state, place / "diffusion_pytorch_model.safetensors")
    (place / "config.json").write_text(json.dumps(told, indent=2, allow_nan=False) + "\n")


def _of_diffusers(place: Path, path: str) -> tuple[VQGANConfig, State]:
    folder = next((place / name for name in FOLDERS if (place / name / "config.json").is_file()), None)
    told = json.loads((folder / "config.json").read_text()) if folder else {}
    kind = told.get("_class_name") if isinstance(told, dict) else None
    if folder is None or kind not in KINDS:
        found = f"a {kind}" if kind else "no config.json of one"
        raise ValueError(f"{path} holds {found}, where diffusers' {' or '.join(KINDS)} is looked for.")
    weights = [folder / f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin")]
    file = next((file for file in weights if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"There are no weights in {path}: {weights[0].name} is looked for.")
    state = _weights(file)
    theirs = {theirs: ours for ours, theirs in _PARTS.items()}
    return _sizes_told(told, path), {_modern(_replaced(name, theirs)): value for name, value in state.items()}


def _sizes_told(told: Mapping[str, Any], path: str) -> VQGANConfig:
    """The config of a folder of diffusers."""
    widths, downs = told["block_out_channels"], told["down_block_types"]
    usual = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "norm_type": "group", "lookup_from_codebook": False}
    for name, wanted in usual.items():
        if told.get(name, wanted) != wanted:
            raise ValueError(f"{path} is a tokenizer of another kind: its {name} is {told[name]}, not {wanted}.")
    ups = [name.replace("DownEncoder", "UpDecoder") for name in reversed(downs)]
    if {*downs} - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"} or list(told["up_block_types"]) != ups:
        raise ValueError(f"{path} is a tokenizer of another kind: its blocks are {downs} and {told['up_block_types']}.")
    channels = gcd(*widths)
    latent = told["latent_channels"]
    return VQGANConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=told["layers_per_block"],
        attention_levels=tuple(level for level, name in enumerate(downs) if name.startswith("Attn")),
        middle_attention=told.get("mid_block_add_attention", True),
        groups=told.get("norm_num_groups", GROUPS),
        latent_channels=latent,
        quantizer=CodebookConfig(size=told["num_vq_embeddings"], width=told.get("vq_embed_dim") or latent),
    )


def _sizes_of(state: Mapping[str, torch.Tensor], path: str) -> VQGANConfig:
    """The config of weights by their authors' names, from the shapes."""

    def count(pattern: str) -> int:
        return len({found[1] for name in state if (found := re.match(pattern, name))})

    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight", "quantize.embedding.weight")
    if lacking := [name for name in needed if name not in state]:
        raise ValueError(
            f"{path} is no VQGAN of taming-transformers or latent-diffusion: it lacks {', '.join(lacking)}."
        )
    levels = range(count(r"encoder\.down\.(\d+)\."))
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    attends = tuple(level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state)
    size, width = state["quantize.embedding.weight"].shape
    return VQGANConfig(
        channels=channels,
        multipliers=tuple(each // channels for each in widths),
        blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
        attention_levels=attends,
        middle_attention="encoder.mid.attn_1.q.weight" in state,
        groups=GROUPS,
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        quantizer=CodebookConfig(size=size, width=width),
    )


def _ours(name: str, levels: int) -> str:
    """Our name for one of CompVis's."""
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = re.sub(r"(_blocks\.\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"(_blocks\.\d+)\.attn\.", r"\1.attentions.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace("coder.norm_out.", "coder.conv_norm_out.")
    theirs = {theirs: ours for ours, theirs in _ATTENTION.items()}
    name = re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda found: f"{found[1]}.{theirs.get(found[2], found[2])}.", name)
    return _replaced(name, {theirs: ours for ours, theirs in _PARTS.items()})


def _modern(name: str) -> str:
    """A name of diffusers as it is today."""
    return re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda found: f"{found[1]}.{_BEFORE.get(found[2], found[2])}.", name)


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for part, other in parts.items():
        if name == part or name.startswith(part + "."):
            return other + name.removeprefix(part)
    return name


def _shaped(value: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Attention by 1x1 convolutions is attention by linear layers."""
    flat = wanted is not None and value.dim() == 4 and wanted.dim() == 2 and value.shape[2:] == (1, 1)
    return (value.flatten(1) if flat else value).float()


def _weights(file: Path) -> State:
    """A file's tensors by name."""
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as tensors alone, without running code that it may hold: {str(error)[:200]}"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ValueError(f"{file} holds no tensors by name.")
    return found


def _without_beside(state: State) -> State:
    """The tokenizer's own, of a training's checkpoint or of a whole latent diffusion."""
    whole, mark = {name: each for name, each in state.items() if name.startswith(WITHIN)}, len(WITHIN)
    own = {name[mark:]: each for name, each in whole.items()} or state
    return {name: each for name, each in own.items() if not name.startswith(BESIDE)}
