"""Encoding as stages: pictures in, codes out; captions in, features of a frozen text encoder out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from t2i.conditions.encoders import TextEncoder, TextEncoderConfig
from t2i.conditions.text_features import POOLED, bits_of, column
from t2i.pixels import scale
from t2i.priors.task import ALT, ALTS
from t2i.tokenizers.task import load_tokenizer


@dataclass
class Encode:
    """Writes codes, a list of int32 in raster order, of each image into a column."""

    tokenizer: str
    cpus: float = 1
    gpus: float = 0
    column: str = "codes"
    reads: tuple[str, ...] = field(default=("pixels",), init=False)
    writes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.writes = (self.column,)

    def setup(self) -> None:
        """Load the tokenizer."""
        self._device = "cuda" if self.gpus else "cpu"
        self._model = load_tokenizer(self.tokenizer).to(self._device)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Codes of a batch of images; those of one size are encoded together."""
        codes: list = [None] * len(batch["pixels"])
        for shape in dict.fromkeys(image.shape for image in batch["pixels"]):
            places = [place for place, image in enumerate(batch["pixels"]) if image.shape == shape]
            images = torch.from_numpy(np.stack([batch["pixels"][place] for place in places])).permute(0, 3, 1, 2)
            found = self._model.encode(scale(images.to(self._device))).flatten(1).int().cpu().numpy()
            for place, row in zip(places, found, strict=True):
                codes[place] = row
        return {self.column: codes}


@dataclass
class EncodeText:
    """Writes features of every caption of a row, bf16 as lists of uint16: of a token after another, and pooled.

    `alts` says how many alt texts a row has at most. `<name>_cut_<style>` says whether a text goes on after what the
    encoder reads of it.
    """

    encoder: TextEncoderConfig
    name: str
    styles: tuple[str, ...]
    alts: int = 1
    texts: int = 64  # that are encoded together
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        captions = [f"caption_{style}" for style in self.styles]
        self.reads: tuple[str, ...] = (*captions, *([ALTS] if self.alts > 1 else []))
        self._places = [(style, 0) for style in self.styles] + [(ALT, place) for place in range(1, self.alts)]
        self._kinds = [""] * self.encoder.tokens + [POOLED] * (self.encoder.pooled != "none")
        features = [column(self.name + kind, *each) for each in self._places for kind in self._kinds]
        self.counted = tuple(cut_column(self.name, style) for style in self.styles)
        self.writes: tuple[str, ...] = (*features, *self.counted)
        self.types = dict.fromkeys(features, "uint16[]") | dict.fromkeys(self.counted, "bool")
        self.optional = tuple(column(self.name + kind, ALT, n) for n in range(1, self.alts) for kind in self._kinds)

    def setup(self) -> None:
        """Load the encoder."""
        self._encoder = TextEncoder(self.encoder, "cuda" if self.gpus else "cpu")

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Features of the captions of a batch; a text that stands there twice is read once."""
        texts = {place: texts_of(batch, *place) for place in self._places}
        every = list(dict.fromkeys(text for each in texts.values() for text in each if text is not None))
        counts = dict(zip(every, self._encoder.tokens.counts(every), strict=True))
        features = self._features(sorted(every, key=lambda text: counts[text]))  # alike in length, for little padding
        written: dict[str, list] = {}
        for (style, place), found in texts.items():
            for kind in self._kinds:
                values = [None if text is None else features[text][kind] for text in found]
                written[column(self.name + kind, style, place)] = values
        long = {text for text in every if counts[text] > self._encoder.sizes.length}
        for style in self.styles:
            rows = zip(*(found for (one, _), found in texts.items() if one == style), strict=True)
            written[cut_column(self.name, style)] = [
                bool(long.intersection(filter(None, row))) if any(row) else None for row in rows
            ]
        return written

    def _features(self, texts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """By text, its bits by kind."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for start in range(0, len(texts), self.texts):
            part = texts[start : start + self.texts]
            read = self._encoder.read(part)
            kinds = {"": read.tokens, POOLED: read.pooled}
            bits = {kind: bits_of(kinds[kind]) for kind in self._kinds}
            lengths = [None] * len(part) if read.seen is None else read.seen.sum(dim=1).tolist()
            for row, (text, length) in enumerate(zip(part, lengths, strict=True)):
                found[text] = {
                    kind: (each[row] if kind else each[row, :length].reshape(-1)) for kind, each in bits.items()
                }
        return found


def texts_of(batch: Mapping[str, Sequence], style: str, place: int) -> list[str | None]:
    """A style's texts or, of several alt texts, those of a further place; None for what is blank: nobody hears it."""
    if place:
        found = [None if texts is None or place >= len(texts) else texts[place] for texts in batch[ALTS]]
    else:
        found = batch[f"caption_{style}"]
    return [text if text and text.strip() else None for text in found]


def cut_column(name: str, style: str) -> str:
    """Which says of a row whether its texts of a style are cut."""
    return f"{name}_cut_{style}"
