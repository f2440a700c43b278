"""Words of an own vocabulary, learned with the prior: a caption as tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from t2i.nn.weights import begins, normal
from t2i.protocol import Batch, Draw, Space, Told
from t2i.vocabulary import NULL, TextVocabulary

STD = 0.5  # of first embeddings


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Words of a vocabulary that is learned from the captions that are trained on."""

    name: str = "text"
    vocabulary_size: int = 8000  # at most; of a trained prior, as many as there are
    length: int = 64  # word ids of a caption, at most
    drop: float | None = None

    def __post_init__(self) -> None:
        if self.length < 1 or self.vocabulary_size < 4:
            raise ValueError("Words need a length of at least 1 and a vocabulary of at least 4 entries.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The caption that was drawn for the row."""
        return ("caption",)

    def rows(self, folder: str) -> "WordsRows":
        """With the vocabulary in `folder`."""
        return WordsRows(self.name, TextVocabulary.load(folder))

    def build(self, width: int, space: Space) -> "Words":
        """Tokens of `width`."""
        return Words(self, width)


@dataclass(frozen=True)
class WordsRows:
    """Captions to word ids (B, T) int64 under the condition's name, padded on the right with 0."""

    name: str
    vocabulary: TextVocabulary

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        return {self.name: self.vocabulary.encode(rows["caption"])}


class Words(nn.Module):
    """Ids (B, T) to tokens (B, T, D), a learned vector a word and a place; the null is a word of its own, alone."""

    says = frozenset({"tokens", "seen"})
    channels = 0

    def __init__(self, config: WordsConfig, width: int) -> None:
        super().__init__()
        self.name, self.length = config.name, config.length
        self.words = begins(nn.Embedding(config.vocabulary_size, width), weight=normal(STD))
        self.places = begins(nn.Embedding(config.length, width), weight=normal(STD))

    def load(self, folder: str) -> None:
        """It keeps nothing but its weights; the vocabulary is its rows'."""

    def ids(self, batch: Batch, dropped: torch.Tensor) -> torch.Tensor:
        """(B, T) int64, 0 for padding: what is said after some captions were dropped."""
        ids_BT = batch[self.name]
        null_T = torch.zeros_like(ids_BT[:1])
        null_T[:, 0] = NULL
        return torch.where(dropped[:, None], null_T, ids_BT)

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        ids_BT = self.ids(batch, dropped)
        return Told(tokens=self.words(ids_BT) + self.places.weight[: ids_BT.shape[1]], seen=ids_BT > 0)
