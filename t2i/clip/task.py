"""The training of CLIP: pictures and their captions, each against all others of the global batch."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from infra import cache, storage
from infra.train import flops
from infra.train.draw import pick
from infra.train.optim import OptimConfig
from infra.train.task import Draw, Update
from t2i.captions import ALT, ALTS, SHARES, caption_columns, heard, texts_of
from t2i.clip import contrast
from t2i.clip.fit import fitted, processor
from t2i.clip.model import CLIP, CLIPConfig
from t2i.clip.words import CLIPWords
from t2i.conditions import encoders
from t2i.task import TRAIN, updates_of

contrast.again = flops.again
encoders.fetched = cache.cached  # models on s3://, once a node


@dataclass(frozen=True, kw_only=True)
class ClipTask:
    """Learn which caption belongs to which picture, on the rows that the mixture keeps."""

    model: CLIPConfig
    words: str  # the folder, local or s3://, of its tokenizer
    styles: tuple[str, ...]  # of the captions that the mixture reads
    optim: OptimConfig
    seed: int = 0

    where_reads: tuple[str, ...] = ("split", "keep")
    bucket: str | None = None  # each picture comes to one square
    whole_weights: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Pictures, and captions with their shares."""
        return ("pixels", *caption_columns(self.styles))

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split that the mixture keeps."""
        return (columns["split"] == TRAIN) & columns["keep"].astype(bool)

    def updates(self) -> list[Update]:
        """Its one turn."""
        return updates_of(CLIP(self.model), {"clip": self.optim}, self.seed)

    def picks(self, rows: dict[str, list], draw: Draw) -> Mapping[str, Sequence[str | None]]:
        """Nothing: each row is its picture and captions."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """`pixels` (B, 3, S, S) uint8, `ids` (B, T) int64, and `text` (B,) int64, equal where texts are."""
        several = any(texts is not None for texts in rows.get(ALTS, ()))
        places = pick(rows[ALTS], draw(ALT), rows[SHARES]) if several else None
        captions = texts_of(rows, heard(rows, self.styles, draw("caption"), places))
        ids, text = _words(self.words, self.model.length)(captions)
        pixels = [fitted(each, self.model.image_size, self.model.fit) for each in rows["pixels"]]
        return {"pixels": np.stack(pixels).transpose(0, 3, 1, 2), "ids": ids, "text": text}

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """As CLIP is published: weights, config, tokenizer and how pictures are brought to their square."""
        module = modules["clip"]
        assert isinstance(module, CLIP)
        with encoders.quiet():
            module.published().save_pretrained(folder)
        processor(self.model.image_size, self.model.fit).save_pretrained(folder)
        with storage.fetched(self.words) as kept:
            shutil.copytree(kept, folder, dirs_exist_ok=True)


@lru_cache  # one a process: a feed collates many batches
def _words(folder: str, length: int) -> CLIPWords:
    with storage.fetched(folder) as local:
        return CLIPWords(local, length)
