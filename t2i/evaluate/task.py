"""The training of an extractor on pictures whose scenes are known."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from infra import cache, storage, strict
from infra.config import from_dict, to_dict
from infra.train.optim import OptimConfig
from infra.train.task import Draw, Update
from t2i.evaluate.extractor import Extractor, ExtractorConfig
from t2i.evaluate.facts import marked
from t2i.pixels import resized, stacked
from t2i.task import TRAIN, updates_of


@dataclass(frozen=True, kw_only=True)
class ExtractorTask:
    """See the facts of the scenes of the training split."""

    model: ExtractorConfig
    facts: tuple[str, ...]
    optim: OptimConfig
    seed: int = 0

    reads: tuple[str, ...] = ("pixels", "scene")
    where_reads: tuple[str, ...] = ("split", "scene")
    bucket: str | None = None
    whole_weights: bool = False

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split whose scene is known."""
        return (columns["split"] == TRAIN) & np.array([scene is not None for scene in columns["scene"]], bool)

    def updates(self) -> list[Update]:
        """The extractor alone."""
        return updates_of(Extractor(self.model, len(self.facts)), {"extractor": self.optim}, self.seed)

    def picks(self, rows: dict[str, list], draw: Draw) -> dict[str, list[str | None]]:
        """Nothing: each row is its picture and its scene."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """Images (B, 3, H, W) uint8 of the model's size, and facts (B, F)."""
        pixels = [resized(image, self.model.size) for image in rows["pixels"]]
        return {"images": stacked(pixels), "facts": marked(rows["scene"], self.facts)}

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """Weights and config."""
        extractor = modules["extractor"]
        assert isinstance(extractor, Extractor)
        save_model(extractor, str(Path(folder) / "model.safetensors"))
        saved = to_dict(_Saved(model=self.model, facts=self.facts))
        Path(folder, "config.json").write_text(strict.dumps(saved, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Saved:
    model: ExtractorConfig
    facts: tuple[str, ...]


def load_extractor(folder: str) -> Extractor:
    """The extractor in a folder, local or s3://, ready for use."""
    with cache.cached(folder) as local:
        saved = from_dict(_Saved, storage.read_json(storage.join(local, "config.json")))
        extractor = Extractor(saved.model, len(saved.facts))
        load_model(extractor, str(Path(local) / "model.safetensors"))
    return extractor.eval().requires_grad_(False)
