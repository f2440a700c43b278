"""Features of a frozen text encoder, cached or computed as they are wanted: a caption as its tokens, or as a vector.

Shapes: B rows, S tokens, E width of the features, P width of a pooled vector, D width of the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from t2i.conditions.encoders import Features, Sizes, TextEncoder, TextEncoderConfig, sizes_of, tokens_of
from t2i.protocol import Batch, Draw, Space, Told

TAKEN = ("caption", "codes", "values", "weight")  # what else rows and batches have
POOLED, SEEN = "_pooled", "_seen"  # after a condition's name


@dataclass(frozen=True, kw_only=True)
class FeatureSizes:
    """Of an encoder, so that a trained prior knows them without it."""

    length: int
    width: int
    pooled: int
    masked: bool


@dataclass(frozen=True, kw_only=True)
class TextFeaturesConfig:
    """Features of a frozen text encoder: of every caption in columns, where an artifact of `encode_text` holds them.

    Without one the encoder reads captions in training, as it reads prompts when pictures are drawn.
    """

    name: str = "features"  # that of the artifact
    encoder: TextEncoderConfig | None = None  # None: that of the artifact
    null: Literal["empty", "zeros"] = "empty"  # the features of "", as GLIDE has it, or zeros in their place, as Imagen
    drop: float | None = None
    sizes: FeatureSizes | None = None  # of a trained prior; else the encoder's own config is asked

    def __post_init__(self) -> None:
        if self.name in TAKEN:
            raise ValueError(f"Features are called by a word of their own, such as clip, but not '{self.name}'.")

    @property
    def reads(self) -> tuple[str, ...]:
        """The caption."""
        return ("caption",)

    def rows(self, folder: str) -> "TextFeaturesRows":
        """Nothing is kept for them; the tokenizer lies with the encoder."""
        return TextFeaturesRows(self.name, self.asked, self.known)

    def build(self, width: int, space: Space) -> "TextFeatures":
        """Tokens, and a vector, of `width`."""
        return TextFeatures(self, width)

    def resolved(self) -> "TextFeaturesConfig":
        """With its sizes."""
        return replace(self, sizes=self.known)

    def picks(self, heard: Sequence[tuple[str, int]]) -> dict[str, list[str]]:
        """Under the names of a batch, the columns of what rows hear: a style, and which of its texts."""
        kinds = [""] * self.asked.tokens + [POOLED] * (self.asked.pooled != "none")
        return {self.name + kind: [column(self.name + kind, style, place) for style, place in heard] for kind in kinds}

    @property
    def asked(self) -> TextEncoderConfig:
        """The encoder; ValueError where there is none."""
        if self.encoder is None:
            raise ValueError(
                f"Nothing says whose features the condition '{self.name}' hears: give it an encoder, or an artifact "
                f"of encode_text whose name is '{self.name}'."
            )
        return self.encoder

    @property
    def known(self) -> FeatureSizes:
        """The sizes."""
        return self.sizes or sizes_told(sizes_of(self.asked))


def sizes_told(sizes: Sizes) -> FeatureSizes:
    """What of an encoder's sizes is kept."""
    return FeatureSizes(length=sizes.length, width=sizes.width, pooled=sizes.pooled, masked=sizes.masked)


def column(name: str, style: str, place: int = 0) -> str:
    """Where the features of a caption lie: of a style's first text or, of several alt texts, of a further one."""
    return f"{name}_{style}_{place}" if place else f"{name}_{style}"


@dataclass(frozen=True)
class TextFeaturesRows:
    """What was cached of the captions, bf16 as uint16: (B, S, E), `<name>_seen` (B, S) and `<name>_pooled` (B, P).

    Of rows without, the token ids (B, S) int64 of their captions, and `<name>_seen`.
    """

    name: str
    encoder: TextEncoderConfig
    sizes: FeatureSizes

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        if self.name not in rows and self.name + POOLED not in rows:
            ids_BS, seen_BS = tokens_of(self.encoder)(rows["caption"])
            return {self.name: ids_BS} | ({} if seen_BS is None else {self.name + SEEN: seen_BS})
        if self.name + POOLED in rows:
            arrays[self.name + POOLED] = np.stack(self._there(rows[self.name + POOLED]))
        if self.name in rows:
            each = [values.reshape(-1, self.sizes.width) for values in self._there(rows[self.name])]
            lengths = np.array([len(values) for values in each])
            padded = np.zeros((len(each), lengths.max(), self.sizes.width), np.uint16)
            for row, values in enumerate(each):
                padded[row, : len(values)] = values
            arrays[self.name] = padded
            if self.sizes.masked:
                arrays[self.name + SEEN] = np.arange(lengths.max()) < lengths[:, None]
        return arrays

    def _there(self, values: list) -> list[np.ndarray]:
        if missing := [row for row, value in enumerate(values) if value is None]:
            raise ValueError(
                f"Row {missing[0]} of the batch has no features '{self.name}' of the caption that it is told: they are "
                "of other captions, or of fewer styles than the mixture reads."
            )
        return [np.asarray(value, np.uint16) for value in values]


class TextFeatures(nn.Module):
    """Features, brought to the network's width by a linear layer each for tokens and the pooled vector.

    The encoder is loaded when it is first wanted, and is no part of this module: nobody trains or saves it.
    """

    channels = 0

    def __init__(self, config: TextFeaturesConfig, width: int) -> None:
        super().__init__()
        self.config, self.sizes, encoder = config, config.known, config.asked
        self.name, self.length = config.name, self.sizes.length if encoder.tokens else 0
        says = {"tokens"} if encoder.tokens else set[str]()
        says |= {"seen"} if encoder.tokens and self.sizes.masked else set()
        self.says = frozenset(says | ({"vector"} if self.sizes.pooled else set()))
        self.tokens = nn.Linear(self.sizes.width, width) if encoder.tokens else None
        self.vector = nn.Linear(self.sizes.pooled, width) if self.sizes.pooled else None
        self._encoder: tuple[TextEncoder, ...] = ()
        self._null: tuple[Features, ...] = ()

    def load(self, folder: str) -> None:
        """The null, where the folder has it; else the encoder is asked for it."""
        path = Path(folder, null_file(self.name))
        if self.config.null == "empty" and path.exists():
            self._null = (load_null(path),)

    def forward(self, batch: Batch, dropped: torch.Tensor) -> Told:
        told, null = self._features(batch, dropped.device), self._nothing(dropped.device)
        vector_BD, tokens_BSD, seen_BS = None, None, None
        if self.vector is not None:
            assert told.pooled is not None
            assert null.pooled is not None
            pooled_BP = torch.where(dropped[:, None], null.pooled, told.pooled)
            vector_BD = self.vector(pooled_BP.to(self.vector.weight.dtype))
        if self.tokens is not None:
            assert told.tokens is not None
            assert null.tokens is not None
            length, both = max(told.tokens.shape[1], null.tokens.shape[1]), (null.tokens, told.tokens)
            ours, theirs = (functional.pad(each, (0, 0, 0, length - each.shape[1])) for each in both)
            features_BSE = torch.where(dropped[:, None, None], ours, theirs)
            tokens_BSD = self.tokens(features_BSE.to(self.tokens.weight.dtype))
            if told.seen is not None and null.seen is not None:
                ours, theirs = (functional.pad(each, (0, length - each.shape[1])) for each in (null.seen, told.seen))
                seen_BS = torch.where(dropped[:, None], ours, theirs)
        return Told(vector=vector_BD, tokens=tokens_BSD, seen=seen_BS)

    def _features(self, batch: Batch, device: torch.device) -> Features:
        """Of the rows: what the batch has of them, or what the encoder makes of their token ids."""
        values, seen, pooled = (batch.get(self.name + kind) for kind in ("", SEEN, POOLED))
        if values is not None and values.dtype == torch.int64:
            return self._reader(device)(values, seen)
        return Features(_numbers(values), seen, _numbers(pooled))

    def _nothing(self, device: torch.device) -> Features:
        """The null, one row."""
        if not self._null:
            self._null = (self._zeros() if self.config.null == "zeros" else self._reader(device).read([""]),)
        null = self._null[0]
        if any(each is not None and each.device != device for each in null):
            null = Features(*(None if each is None else each.to(device) for each in null))
            self._null = (null,)
        return null

    def _zeros(self) -> Features:
        length = 1 if self.sizes.masked else self.sizes.length
        tokens = torch.zeros(1, length, self.sizes.width, dtype=torch.bfloat16) if self.length else None
        seen = torch.ones(1, length, dtype=torch.bool) if self.length and self.sizes.masked else None
        pooled = torch.zeros(1, self.sizes.pooled, dtype=torch.bfloat16) if self.sizes.pooled else None
        return Features(tokens, seen, pooled)

    def _reader(self, device: torch.device) -> TextEncoder:
        if not self._encoder:
            self._encoder = (TextEncoder(self.config.asked, device),)
        return self._encoder[0]


def null_file(name: str) -> str:
    """In which the null of a condition lies beside a prior."""
    return f"null_{name}.safetensors"


def save_null(null: Features, path: str | Path) -> None:
    """The features of one text, as `load_null` reads them."""
    held = {name: each for name, each in zip(Features._fields, null, strict=True) if each is not None}
    save_file({name: each.cpu().contiguous() for name, each in held.items()}, path)


def load_null(path: str | Path) -> Features:
    """What `save_null` wrote."""
    held = load_file(path)
    return Features(*(held.get(name) for name in Features._fields))


def _numbers(values: torch.Tensor | None) -> torch.Tensor | None:
    return values.view(torch.bfloat16) if values is not None and values.dtype == torch.uint16 else values


def bits_of(features: torch.Tensor | None) -> np.ndarray:
    """bf16 as uint16."""
    assert features is not None
    return features.contiguous().view(torch.uint16).cpu().numpy()
