"""The training of an image tokenizer: one Update, or two where a critic judges the pictures."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from infra import cache, storage, strict
from infra.config import from_dict, to_dict
from infra.others import with_others
from infra.train.optim import OptimConfig
from infra.train.task import Draw, Update
from t2i.task import TRAIN, updates_of
from t2i.tokenizers import published
from t2i.tokenizers.clip import ClipConfig
from t2i.tokenizers.critic import Critic, CriticConfig
from t2i.tokenizers.dvae import DVAEConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.published import OWN, SCALE, PublishedConfig
from t2i.tokenizers.scale import Scale
from t2i.tokenizers.turns import GeneratorTurn
from t2i.tokenizers.vit_vqgan import ViTVQGANConfig
from t2i.tokenizers.vq_vae import VQVAEConfig
from t2i.tokenizers.vqgan import VQGANConfig

TokenizerConfig = (
    VQGANConfig
    | PatchVQGANConfig
    | VQVAEConfig
    | ViTVQGANConfig
    | DVAEConfig
    | MaskGITVQGANConfig
    | PixelsConfig
    | PublishedConfig
    | ClipConfig
)
if not TYPE_CHECKING:
    TokenizerConfig = with_others(TokenizerConfig, "rescribe.tokenizers")  # of other packages: docs/python.md


@dataclass(frozen=True, kw_only=True)
class TokenizerTask:
    """Reconstruct the images of the training split."""

    model: TokenizerConfig
    losses: LossConfig
    optim: OptimConfig
    critic: CriticConfig | None = None
    critic_optim: OptimConfig | None = None
    seed: int = 0
    begin: str = ""  # the folder of a tokenizer with whose weights training begins; none: with fresh ones

    reads: tuple[str, ...] = ("pixels",)
    where_reads: tuple[str, ...] = ("split",)
    bucket: str | None = None  # the column of the pictures' sizes, where they have several

    @property
    def critics(self) -> tuple[CriticConfig, ...]:
        """Those who judge, all in one turn."""
        return () if self.critic is None else (self.critic,)

    @property
    def whole_weights(self) -> bool:
        """The tokenizer is judged by critics, and these judge what the tokenizer rebuilds."""
        return bool(self.critics)

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split."""
        return columns["split"] == TRAIN

    def updates(self) -> list[Update]:
        """The tokenizer's turn and, with a critic, the critics'."""
        critics = [Critic(config) for config in self.critics]
        learner = GeneratorTurn(build_tokenizer(self.model), self.losses, critics)
        if self.begin:
            learner.begin = lambda: load_weights(learner.tokenizer, self.begin)
        optims = {"tokenizer": self.optim, "critic": self.critic_optim or self.optim}
        return updates_of(learner, optims, self.seed)

    def picks(self, rows: dict[str, list], draw: Draw) -> dict[str, list[str | None]]:
        """Nothing: each row is its picture."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """Images (B, 3, H, W) uint8, which the module scales: less travels; and a `noise_key` a row."""
        keys = (draw("noise") * 2.0**53).astype(np.int64)
        return {"images": np.stack(rows["pixels"]).transpose(0, 3, 1, 2), "noise_key": keys}

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """The tokenizer alone."""
        generator = modules["tokenizer"]
        assert isinstance(generator, GeneratorTurn)
        save_tokenizer(generator.tokenizer, folder)


def build_tokenizer(config: TokenizerConfig) -> Any:
    """The tokenizer that a config describes, with fresh weights."""
    return config.build()


def check_patches(config: TokenizerConfig, sizes: Sequence[tuple[int, int]]) -> None:
    """ValueError where pictures of a size (height, width) do not divide into what a code stands for.

    Of a published tokenizer that is not on this machine that is not known.
    """
    with suppress(FileNotFoundError):
        for size in sizes:
            config.grid(size)


@dataclass(frozen=True, kw_only=True)
class _Saved:
    model: TokenizerConfig


published.configured = lambda told: from_dict(_Saved, told).model


def save_tokenizer(tokenizer: Any, folder: str) -> None:
    """Weights, config and, where it has one, its scale into a local folder."""
    save_model(tokenizer, str(Path(folder) / OWN))
    Path(folder, "config.json").write_text(strict.dumps(to_dict(_Saved(model=tokenizer.config)), indent=2) + "\n")
    if (scale := getattr(tokenizer, "scale", None)) is not None:
        save_scale(scale, folder)


def save_scale(scale: Scale, url: str) -> None:
    """Into the folder of a tokenizer, local or s3://."""
    storage.write_json(storage.join(url, SCALE), to_dict(scale))


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder, local or s3://, ready for use."""
    with cache.cached(folder) as local:
        tokenizer = build_tokenizer(from_dict(_Saved, storage.read_json(storage.join(local, "config.json"))).model)
        if storage.exists(scale := storage.join(local, SCALE)):
            tokenizer.scale = from_dict(Scale, storage.read_json(scale))
    load_weights(tokenizer, folder)
    return tokenizer.eval().requires_grad_(False)


def load_weights(tokenizer: Any, folder: str) -> None:
    """Those of the tokenizer in a folder, local or s3://, which is of the same config."""
    with cache.cached(folder) as local:
        load_model(tokenizer, str(Path(local) / OWN))
