"""How far two pictures are for a network that has learned to see: the perceptual term of a tokenizer's losses.

Nothing is downloaded: a user names a file or a folder. Shapes: B rows, pictures (B, 3, H, W) in [-1, 1].
"""

import itertools
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from t2i.conditions import encoders
from t2i.conditions.encoders import found_at, quiet

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG16 (arXiv 1409.1556, D): channels, convolutions
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's pixels in [-1, 1]


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """LPIPS on VGG16 (arXiv 1801.03924), as VQGAN and latent diffusion were trained with.

    `weights` is a file or a folder of files (safetensors; state dicts as .pth, .pt), or a folder on s3://. Together
    they have the convolutions of VGG16, by the names of torchvision or of the package lpips, and lpips's linear layers.
    """

    weights: str

    def load(self) -> nn.Module:
        """The network; FileNotFoundError or ValueError where it cannot be had."""
        with encoders.fetched(self.weights) if "://" in self.weights else nullcontext(self.weights) as local:
            return LPIPS(_state(Path(local)), self.weights)


@dataclass(frozen=True, kw_only=True)
class ClipDistanceConfig:
    """The same distance between what the layers of CLIP's picture tower see: of one trained here, or published.

    `model` is a folder in the layout of transformers, or a hub's name. Of a tower that was trained on few pictures it
    says less than LPIPS.
    """

    model: str

    def load(self) -> nn.Module:
        """The network; FileNotFoundError, ConnectionError or ValueError where it cannot be had."""
        return ClipDistance(self.model)


def distance(first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(B,): eq. 1 of arXiv 1801.03924 for one layer (B, C, *places), whose channels weigh `weights` (C,), or the same.

    The vectors of each place have length 1; their squared differences are summed over channels, averaged over places.
    """
    first, second = (each.float().flatten(2) for each in (first, second))
    gap = (first / (first.norm(dim=1, keepdim=True) + 1e-10) - second / (second.norm(dim=1, keepdim=True) + 1e-10)) ** 2
    summed = gap.sum(1) if weights is None else torch.einsum("bcp,c->bp", gap, weights.float())
    return summed.mean(1)


class LPIPS(nn.Module):
    """VGG16 up to its last ReLU, and what each channel of five of its layers weighs."""

    def __init__(self, state: dict[str, torch.Tensor], origin: str = "the given weights") -> None:
        super().__init__()
        layers, self._ends = list[nn.Module](), list[int]()
        for number, (channels, count) in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if number else []
            before = STAGES[number - 1][0] if number else 3
            for width in (before, *[channels] * (count - 1)):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            self._ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.weights = nn.ParameterList(torch.empty(channels) for channels, _ in STAGES)
        self._mean: torch.Tensor
        self._std: torch.Tensor
        self.register_buffer("_mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        wanted = self.state_dict()
        found = {_name(name): value for name, value in state.items()}
        found = {name: value.reshape(-1) if name.startswith("weights") else value for name, value in found.items()}
        wrong = sorted(name for name in wanted if name not in found or found[name].shape != wanted[name].shape)
        if wrong:
            raise ValueError(
                f"{origin} does not have {len(wrong)} of the weights of LPIPS, such as {_theirs(wrong[0])}: it needs "
                "the convolutions of VGG16 and the linear layers of the package lpips (net='vgg')."
            )
        self.load_state_dict({name: found[name] for name in wanted})
        self.eval().requires_grad_(False)

    def forward(self, rebuilt: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(B,), 0 for equal pictures."""
        both, total = torch.cat([rebuilt, images]), rebuilt.new_zeros(len(rebuilt), dtype=torch.float32)
        seen = (both - self._mean) / self._std
        for (start, end), weights in zip(itertools.pairwise((0, *self._ends)), self.weights, strict=True):
            seen = self.features[start:end](seen)
            first, second = seen.chunk(2)
            total = total + distance(first, second, weights)
        return total


class ClipDistance(nn.Module):
    """The mean over the layers of CLIP's picture tower."""

    def __init__(self, model: str) -> None:
        import transformers

        super().__init__()
        towers: Any = transformers.CLIPVisionModel
        with found_at(model, "CLIP") as (name, folder), quiet():
            self.tower, report = towers.from_pretrained(name, **folder, output_loading_info=True)
        if missing := report["missing_keys"]:
            raise ValueError(f"{model} lacks {len(missing)} weights of CLIP's picture tower, such as {min(missing)}.")
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, in [0, 1]
        self._mean: torch.Tensor
        self._std: torch.Tensor
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, rebuilt: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(B,), 0 for equal pictures; these are stretched to the tower's square."""
        side = self.tower.config.image_size
        both = torch.cat([rebuilt, images])
        if both.shape[-2:] != (side, side):
            both = functional.interpolate(both, (side, side), mode="bilinear", antialias=True)
        layers = self.tower(((both + 1) / 2 - self._mean) / self._std, output_hidden_states=True).hidden_states[1:]
        return torch.stack([distance(*layer.transpose(1, 2).chunk(2)) for layer in layers]).mean(0)


def _state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, or of the files of a folder."""
    kinds = (".safetensors", ".pth", ".pt")
    files = sorted(each for each in path.iterdir() if each.suffix in kinds) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"There are no weights of LPIPS at {path}: give a file, or a folder with {kinds}.")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
        else:
            state |= torch.load(file, map_location="cpu", weights_only=True)  # no code of a file runs
    return state


def _name(theirs: str) -> str:
    """Ours for a name of torchvision or lpips."""
    name = re.sub(r"^(vgg\.|net\.)", "", theirs)
    name = re.sub(r"^slice\d\.(\d+)\.", r"features.\1.", name)
    return re.sub(r"^lin(\d)\.model\.1\.weight$", r"weights.\1", name)


def _theirs(name: str) -> str:
    return re.sub(r"^weights\.(\d)$", r"lin\1.model.1.weight", name)
