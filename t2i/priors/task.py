"""The training of a prior: captions drawn from the mixture, some of them dropped, and the codes of the images."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from infra import storage, strict
from infra.config import from_dict, setting, to_dict
from infra.train.draw import pick
from infra.train.optim import OptimConfig
from infra.train.task import Draw, Update
from t2i.captions import choose
from t2i.priors.autoregressive import AutoregressiveConfig, AutoregressivePrior
from t2i.vocabulary import NULL, TextVocabulary

TRAIN = "train"  # the split that is trained on
ALT, ALTS, SHARES = "alt", "captions_alt?", "weights_alt?"  # several alt texts of a row, and the shares of each
PriorConfig = AutoregressiveConfig  # or that of another prior: docs/adding-a-model.md
PRIORS: dict[type, Any] = {AutoregressiveConfig: AutoregressivePrior}  # by their configs


def check_sizes(config: PriorConfig, sizes: Sequence[str]) -> None:
    """ValueError where pictures have several sizes, and a prior of this config knows one grid of codes alone."""
    if len(sizes) > 1 and not getattr(PRIORS[type(config)], "several_grids", False):
        raise ValueError(
            f"The prior of {type(config).__name__} learns pictures of one size, but buckets give them "
            f"{len(sizes)} ({', '.join(sizes)}): train it on a corpus with an image_size; a tokenizer takes buckets."
        )


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """What a prior has to know beside its own sizes."""

    model: PriorConfig = setting(was=AutoregressiveConfig)
    vocabulary_size: int
    text_length: int
    codebook_size: int
    grid: tuple[int, int]

    def build(self) -> Any:
        """The prior, with fresh weights: a module that follows `Prior`."""
        return PRIORS[type(self.model)](
            self.model,
            vocabulary_size=self.vocabulary_size,
            text_length=self.text_length,
            codebook_size=self.codebook_size,
            grid=self.grid,
        )


@dataclass(frozen=True, kw_only=True)
class PriorTask:
    """Learn p(codes | caption) on the rows that the mixture keeps."""

    shape: PriorShape
    vocabulary: str  # the folder of the text vocabulary
    styles: tuple[str, ...]  # of the captions that the mixture reads
    optim: OptimConfig
    drop: float = 0.1  # share of the captions that are dropped, for classifier-free guidance (arXiv 2207.12598)
    text_weight: float = 1 / 7  # of the caption's loss against that of the codes, where the model learns it
    seed: int = 0

    where_reads: tuple[str, ...] = ("split", "keep")
    bucket: str | None = None
    whole_weights: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Codes, and the captions with their shares; of a corpus with several alt texts a picture all of them."""
        several = (ALTS, SHARES) if ALT in self.styles else ()
        return ("codes", *several, *(f"{kind}_{style}" for style in self.styles for kind in ("caption", "weight")))

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split that the mixture keeps."""
        return (columns["split"] == TRAIN) & columns["keep"].astype(bool)

    def updates(self) -> list[Update]:
        """The prior's."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            prior = self.shape.build()
        return [Update("prior", prior, self.optim, {"text": self.text_weight})]

    def picks(self, rows: dict[str, list], draw: Draw) -> dict[str, list[str | None]]:
        """Nothing: each row has codes of its own."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """Word ids (B, T) and codes (B, N), both int64."""
        captions = {style: rows[f"caption_{style}"] for style in self.styles}
        if any(texts is not None for texts in rows.get(ALTS, ())):
            places = pick(rows[ALTS], draw(ALT), rows[SHARES])
            drawn = zip(rows[ALTS], places, captions[ALT], strict=True)
            captions[ALT] = [first if texts is None else texts[place] for texts, place, first in drawn]
        weights = {style: np.array(rows[f"weight_{style}"], dtype=np.float64) for style in self.styles}
        chosen = choose(captions, weights, draw("caption"))
        dropped = draw("drop") < self.drop
        vocabulary = _vocabulary(self.vocabulary)
        text = vocabulary.encode(["" if drop else caption for caption, drop in zip(chosen, dropped, strict=True)])
        return {"text": text, "codes": np.stack(rows["codes"], dtype=np.int64)}

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """The prior and its vocabulary."""
        save_model(modules["prior"], str(Path(folder) / "model.safetensors"))
        Path(folder, "config.json").write_text(strict.dumps(to_dict(self.shape), indent=2) + "\n")
        _vocabulary(self.vocabulary).save(folder)


def load_prior(folder: str) -> tuple[Any, TextVocabulary]:
    """The prior in a folder, local or s3://, ready for use, and the words that it reads."""
    with storage.fetched(folder) as local:
        prior = from_dict(PriorShape, storage.read_json(storage.join(local, "config.json"))).build()
        load_model(prior, str(Path(local) / "model.safetensors"))
        return prior.eval().requires_grad_(False), TextVocabulary.load(local)


def null_text() -> torch.Tensor:
    """What stands for a dropped caption, (1,) int64."""
    return torch.tensor([NULL])


_VOCABULARIES: dict[str, TextVocabulary] = {}  # one a process: a feed collates many batches


def _vocabulary(folder: str) -> TextVocabulary:
    if folder not in _VOCABULARIES:
        _VOCABULARIES[folder] = load_vocabulary(folder)
    return _VOCABULARIES[folder]


def load_vocabulary(url: str) -> TextVocabulary:
    """Out of a folder, local or s3://."""
    with storage.fetched(url) as local:
        return TextVocabulary.load(local)


def save_vocabulary(vocabulary: TextVocabulary, url: str) -> None:
    """Into a folder, local or s3://."""
    with tempfile.TemporaryDirectory() as local:
        vocabulary.save(local)
        storage.upload(local, url)
