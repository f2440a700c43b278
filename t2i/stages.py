"""Encoding and drawing as stages: pictures to values, captions to features of a text encoder, prompts to pictures."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from infra import storage, strict
from infra.config import from_dict, to_dict
from infra.data.images import decode, encode_png
from infra.data.shards import ShardReader
from t2i.chain import Link, paint
from t2i.clip.embedder import Embedder
from t2i.conditions.encoders import TextEncoder, TextEncoderConfig
from t2i.conditions.text_features import POOLED, bits_of, column
from t2i.infotext import PARAMETERS, infotext
from t2i.pixels import scale, to_pixels
from t2i.priors.asking import CAPTION, PICTURE, Asking
from t2i.priors.task import ALT, ALTS, load_asking, load_prior
from t2i.tokenizers.scale import sums_of
from t2i.tokenizers.task import load_tokenizer
from t2i.values import deviation_column

NAMESPACE = "rescribe"  # the keyword of a PNG's text that says in JSON how it was drawn


def code_dtype(codes: int) -> str:
    """The least of NumPy's types that a shard writes so many codes in."""
    return "uint16" if codes <= 2**16 else "int32" if codes <= 2**31 else "int64"


@dataclass
class Encode:
    """Writes what a tokenizer makes of each image into a column, as a list in raster order.

    Codes are whole numbers; continuous values, or with `latents` those before codes, are bf16 as lists of uint16, and
    with `deviations` theirs stand in a column beside.
    """

    tokenizer: str
    cpus: float = 1
    gpus: float = 0
    column: str = "codes"
    latents: bool = False
    deviations: bool = False
    dtype: str = ""  # of what is written; none: of what the tokenizer is found to make
    reads: tuple[str, ...] = field(default=("pixels",), init=False)
    writes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        beside = deviation_column(self.column)
        self.writes = (self.column, beside) if self.deviations else (self.column,)
        self.types: dict[str, str] = dict.fromkeys(self.writes, f"{self.dtype}[]") if self.dtype else {}

    def setup(self) -> None:
        """Load the tokenizer."""
        self._device = "cuda" if self.gpus else "cpu"
        self._model = load_tokenizer(self.tokenizer).to(self._device)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Values of a batch of images; those of one size are encoded together."""
        return dict(zip(self.writes, alike(batch["pixels"], self._encode), strict=True))

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        images = scale(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device))
        if self.deviations:
            return tuple(bits_of(each.flatten(1).bfloat16()) for each in self._model.moments(images))
        values = self._model.latents(images) if self.latents else self._model.encode(images)
        if values.is_floating_point():
            return (bits_of(values.flatten(1).bfloat16()),)
        return (values.flatten(1).cpu().numpy().astype(self.dtype or "int32"),)


def alike(pixels: Sequence[np.ndarray], found: Callable[[np.ndarray], Iterable[Iterable]]) -> list[list]:
    """What a function finds, several lists, of images (N, H, W, 3) of one size, for images of any in their order."""
    columns: list[list] = []
    for shape in dict.fromkeys(image.shape for image in pixels):
        places = [place for place, image in enumerate(pixels) if image.shape == shape]
        for number, values in enumerate(found(np.stack([pixels[place] for place in places]))):
            if number == len(columns):
                columns.append([None] * len(pixels))
            for place, value in zip(places, values, strict=True):
                columns[number][place] = value
    return columns


@dataclass
class Measure:
    """Writes of the latents of an image, not scaled, how many there are, and the mean and squares of each channel.

    Images are those that `shard` and `place` name in an index.
    """

    tokenizer: str
    images: str
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(default=("shard", "place"), init=False)
    writes: tuple[str, ...] = field(default=("count", "means", "squares"), init=False)
    types: dict[str, str] = field(
        default_factory=lambda: {"count": "double", "means": "double[]", "squares": "double[]"}, init=False
    )

    def setup(self) -> None:
        """Load the tokenizer."""
        self._device = "cuda" if self.gpus else "cpu"
        self._model = load_tokenizer(self.tokenizer).to(self._device)
        self._model.scale = None

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Sums of a batch of rows."""
        pixels: list[Any] = [None] * len(batch["shard"])
        for shard in dict.fromkeys(batch["shard"]):  # each is opened once
            mine = [row for row, each in enumerate(batch["shard"]) if each == shard]
            found = ShardReader([self.images], shard).rows(["pixels"], [batch["place"][row] for row in mine])["pixels"]
            for row, value in zip(mine, found, strict=True):
                pixels[row] = value
        return dict(zip(self.writes, alike(pixels, self._measured), strict=True))

    def _measured(self, pixels: np.ndarray) -> list[tuple]:
        images = scale(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device))
        sums = [sums_of(latents) for latents in self._model.latents(images).cpu().numpy()]
        return list(zip(*sums, strict=True))


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


@dataclass(frozen=True)
class LinkAt:
    """A link of a chain by where its models lie."""

    prior: str  # a folder
    tokenizer: str  # a folder
    space: str  # the id of the tokenizer's artifact
    sampling: Any  # the config of the prior's family
    candidates: int = 1
    judge: str = ""  # a CLIP, by folder or hub's name, that likes one of them best
    model: str = ""  # what its pictures say drew them
    sha256: str = ""  # of the prior's weights

    def load(self, device: str) -> Link:
        """The link, on a device."""
        prior, ask = load_prior(self.prior)
        judge = Embedder(self.judge, device).judge if self.judge else None
        tokenizer = load_tokenizer(self.tokenizer).to(device)
        how = {"given": ask.given, "candidates": self.candidates, "judge": judge}
        return Link(prior.to(device), ask, self.sampling, tokenizer, self.space, **how)


@dataclass
class Paint:
    """Draws a picture of each prompt into the column `image`, a PNG that says how it was drawn.

    `seed` is a row's own. `settings` is JSON, null or a list of tables: what a row has otherwise in the sampling of
    each link. `told` is JSON, too: what the row tells beside its prompt, of which `pixels` is the path of a picture;
    where it is null, and `shard` is not, it is read from row `place` of that shard of the artifact `beside`. In bf16
    matrices are multiplied in 16 bits.
    """

    links: tuple[LinkAt, ...]
    beside: str = ""
    precision: Literal["fp32", "bf16"] = "fp32"
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(
        default=("prompt", "negative", "seed", "settings", "told", "shard", "place"), init=False
    )
    writes: tuple[str, ...] = field(default=("image",), init=False)
    types: dict[str, str] = field(default_factory=lambda: {"image": "binary"}, init=False)

    def setup(self) -> None:
        """Load the priors and the tokenizers."""
        self._device = "cuda" if self.gpus else "cpu"
        self._links = [link.load(self._device) for link in self.links]
        reads = dict.fromkeys(name for ask in askings(self.links) for name in ask.reads)
        self._columns = [name for name in reads if name != CAPTION]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Pictures of a batch of prompts; those of the same settings are drawn together."""
        told = self._told(batch)
        images: list[bytes | None] = [None] * len(batch["prompt"])
        kinds = [
            (settings or "", negative is None, tuple(sorted(columns)))
            for settings, negative, columns in zip(batch["settings"], batch["negative"], told, strict=True)
        ]
        for kind in dict.fromkeys(kinds):
            places = [place for place, each in enumerate(kinds) if each == kind]
            rows = {name: [batch[name][place] for place in places] for name in ("prompt", "negative", "seed")}
            beside = [told[place] for place in places]
            for place, image in zip(places, self._paint(kind[0], rows, beside), strict=True):
                images[place] = image
        return {"image": images}

    def _paint(self, settings: str, rows: dict[str, list], told: list[dict[str, Any]]) -> list[bytes]:
        """PNGs of rows that have their settings in common."""
        samplings = settled([link.sampling for link in self._links], json.loads(settings) if settings else ())
        links = [replace(link, sampling=own) for link, own in zip(self._links, samplings, strict=True)]
        columns = {CAPTION: rows["prompt"]} | {name: [each[name] for each in told] for name in told[0]}
        negative = rows["negative"] if rows["negative"][0] is not None else []
        with torch.autocast(self._device, torch.bfloat16, enabled=self.precision == "bf16"):
            painted = paint(links, columns, rows["seed"], negative=negative)
        if painted.pictures is None:
            raise ValueError("What this prior draws is no picture, and its tokenizer does not make one of it.")
        return [
            self._png(pixels, prompt, negative or "", seed, samplings, each)
            for pixels, prompt, negative, seed, each in zip(
                to_pixels(painted.pictures), *(rows[name] for name in ("prompt", "negative", "seed")), told, strict=True
            )
        ]

    def _png(
        self,
        pixels: np.ndarray,
        prompt: str,
        negative: str,
        seed: int,
        samplings: Sequence[Any],
        told: Mapping[str, Any],
    ) -> bytes:
        """With what anybody needs who wants to draw it again."""
        size = (pixels.shape[0], pixels.shape[1])
        links = [
            {"model": at.model, "weights_sha256": at.sha256, "sampling": to_dict(sampling)}
            | ({"candidates": at.candidates} if at.judge else {})
            for at, sampling in zip(self.links, samplings, strict=True)
        ]
        beside = {name: value for name, value in told.items() if isinstance(value, str | int | float)}
        own = {"prompt": prompt, "negative": negative, "seed": seed, "told": beside}
        own |= {"links": links, "precision": self.precision}
        first = self.links[0]
        parameters = infotext(prompt, negative, seed, size, samplings[0], first.model, first.sha256)
        return encode_png(pixels, {PARAMETERS: parameters, NAMESPACE: strict.dumps(own)})

    def _told(self, batch: dict[str, list]) -> list[dict[str, Any]]:
        """What each row tells beside its prompt."""
        told = [_own(json.loads(text)) if text else {} for text in batch["told"]]
        shards = batch["shard"] if self._columns else []
        for shard in dict.fromkeys(shard for shard in shards if shard is not None):  # each is opened once
            mine = [row for row, each in enumerate(shards) if each == shard]
            found = ShardReader([self.beside], shard).rows(self._columns, [batch["place"][row] for row in mine])
            for name in self._columns:
                for row, value in zip(mine, found[name], strict=True):
                    told[row][name] = value
        return told


def askings(links: Sequence[LinkAt]) -> list[Asking]:
    """What each link is to be told beside what the chain gives it; no weights are read."""
    several = [load_asking(link.prior) for link in links]
    # The first has no picture before it: it is told one, if it hears one.
    given = [
        [name for name, space in ask.given.items() if place or space != PICTURE] for place, ask in enumerate(several)
    ]
    return [ask.without(names) for ask, names in zip(several, given, strict=True)]


def settled(samplings: Sequence[Any], settings: Sequence[Mapping[str, Any]]) -> list[Any]:
    """How the links of a chain draw where the first of them have some fields otherwise; ValueError where none can."""
    own = [*settings, *({} for _ in samplings[len(settings) :])]
    return [
        from_dict(type(sampling), {**to_dict(sampling), **more}) if more else sampling
        for sampling, more in zip(samplings, own, strict=True)
    ]


def _own(told: dict[str, Any]) -> dict[str, Any]:
    """What a user tells, with the picture in the place of its path."""
    path = told.get(PICTURE)
    return told | {PICTURE: decode(storage.read_bytes(path))} if isinstance(path, str) else told
