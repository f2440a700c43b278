"""Tokenizers that others trained, or that are kept here, by their folder or file, to our config and names.

Read are folders that are kept here, of diffusers' `VQModel` and `AutoencoderKL`, also as `vae` or `vqvae` of a
pipeline, and files (safetensors, or state dicts as .ckpt, .pt, .pth, .bin) of CompVis/taming-transformers,
CompVis/latent-diffusion, thuanz123/enhancing-transformers and bytedance/1d-tokenizer. No code of a file runs.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from t2i.conditions import encoders
from t2i.tokenizers import diffusers_folder, layouts, sizes
from t2i.tokenizers.autoencoder import Autoencoder
from t2i.tokenizers.scale import Scale

State = dict[str, torch.Tensor]

FOLDERS = ("", "vae", "vqvae")  # of a pipeline, or the model's own
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of files
WITHIN, FACTOR = "first_stage_model.", "scale_factor"  # the tokenizer of a whole latent diffusion, and its scale
OWN, SCALE = "model.safetensors", "scale.json"  # in a folder that is kept here, beside config.json

# Whose a file is, by a weight that no other kind has: its sizes, and our names.
KINDS: dict[str, tuple[Callable[[layouts.Weights], Any], Callable[[layouts.Weights], State]]] = {
    "encoder.to_patch_embedding.0.weight": (sizes.of_enhancing_transformers, layouts.of_enhancing_transformers),
    "encoder.mid.0.norm1.weight": (sizes.of_1d_tokenizer, layouts.of_1d_tokenizer),
    "post_quant_conv.weight": (sizes.of_compvis, layouts.of_compvis),
}


def _unknown(told: Mapping[str, Any]) -> Any:
    raise RuntimeError("Import t2i.tokenizers.task to read a folder that is kept here.")


configured: Callable[[Mapping[str, Any]], Any] = _unknown  # our config.json to a config: `task.py` says how


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """A tokenizer that others trained, by its folder or file, or a folder on s3://; or the folder of one of ours.

    A recipe that does not train it (`train: null`) uses it as it is; else training begins from it.

    A folder of diffusers tells its scale. A file does not, but of some whole latent diffusions: then `scale` is None,
    and a recipe measures one where values are continuous. To give it one, as Stable Diffusion's 0.18215, keep it here:
    `load_published(path)`, then `tokenizer.scale = Scale(factor=(0.18215,))`, `save_tokenizer(tokenizer, folder)`, and
    name that folder.
    """

    path: str

    def build(self) -> Autoencoder:
        """The tokenizer with its weights; FileNotFoundError or ValueError where it cannot be had."""
        return load_published(self.path)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Positions (h, w) of images of `size` (height, width); ValueError where it does not divide."""
        return read_published(self.path).config.grid(size)


class Published(NamedTuple):
    """What is read: the config, all its weights by our names, and the scale of its latents, where one is told."""

    config: Any
    state: State
    scale: Scale | None = None


def load_published(path: str) -> Any:
    """The tokenizer at a path, with its weights and its scale."""
    config, state, scale = read_published(path)
    tokenizer = config.build()
    tokenizer.load_state_dict(state)
    if scale is not None:
        tokenizer.scale = scale
    return tokenizer


def read_published(path: str) -> Published:
    """A published tokenizer; FileNotFoundError or ValueError where it cannot be had."""
    with encoders.fetched(path) if "://" in path else nullcontext(path) as local:
        place = Path(local)
        if not place.exists():
            raise FileNotFoundError(
                f"There is no tokenizer at {path}: give a folder of diffusers or of ours, or a file of weights."
            )
        read = _of_folder if place.is_dir() else _of_file
        try:
            found = read(place)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        wanted = found.config.build().state_dict()
    state = {name: value.float() if value.is_floating_point() else value for name, value in found.state.items()}
    for told, names in (("lacks", wanted.keys() - state.keys()), ("has, beside ours,", state.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path} {told} {len(names)} weights of a tokenizer like this, such as {min(names)}.")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{name} of {path} is of shape {tuple(value.shape)}, where its sizes say {tuple(wanted[name].shape)}."
            )
    return found._replace(state=state)


def _of_folder(place: Path) -> Published:
    """Ours, diffusers' own, or that of a pipeline."""
    folder = next((place / name for name in FOLDERS if (place / name / "config.json").is_file()), None)
    told = json.loads((folder / "config.json").read_text()) if folder else {}
    kind = told.get("_class_name") if isinstance(told, dict) else None
    if folder is not None and isinstance(told, dict) and "model" in told and kind is None:
        scale = json.loads((folder / SCALE).read_text()) if (folder / SCALE).is_file() else None
        return Published(
            configured(told),
            load_file(folder / OWN),
            scale and Scale(**{name: tuple(map(float, each)) for name, each in scale.items()}),
        )
    known = (diffusers_folder.VQ, diffusers_folder.KL)
    if folder is None or kind not in known:
        found = f"a {kind}" if kind else "no config.json of one"
        raise ValueError(
            f"It holds {found}, where a tokenizer of ours or diffusers' {' or '.join(known)} is looked for."
        )
    file = next((folder / name for name in diffusers_folder.WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"There are no weights in {folder}: {diffusers_folder.WEIGHTS[0]} is looked for.")
    config, scale = diffusers_folder.config_of(told), diffusers_folder.scale_of(told)
    return Published(config, layouts.of_diffusers(_weights(file)), scale)


def _of_file(place: Path) -> Published:
    """Of whichever kind its names say."""
    state = _weights(place)
    factor, mark = state.get(FACTOR), len(WITHIN)
    if whole := {name[mark:]: each for name, each in state.items() if name.startswith(WITHIN)}:
        state = whole
    else:
        factor = None
    kind = next((kind for name, kind in KINDS.items() if name in state), None)
    if kind is None:
        raise ValueError(
            "It is no tokenizer of taming-transformers, latent-diffusion, enhancing-transformers or 1d-tokenizer: "
            f"it has none of {', '.join(KINDS)}."
        )
    config, ours = (read(state) for read in kind)
    scale = None if factor is None or factor == 1 else Scale(factor=(float(factor),))
    return Published(config, ours, scale)


def _weights(file: Path) -> State:
    """A file's tensors by name."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file.name} cannot be read as tensors alone, without running code that it may hold: {str(error)[:200]}"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ValueError("It holds no tensors by name.")
    return found
