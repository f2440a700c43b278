"""The training of a prior: what it is told of each row, some of it dropped, and the values of the pictures."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_model

from infra import cache, storage, strict
from infra.config import from_dict, setting, to_dict
from infra.others import with_others
from infra.train import flops
from infra.train.draw import pick
from infra.train.optim import OptimConfig
from infra.train.task import Draw, Update
from t2i.captions import ALT, ALTS, SHARES, caption_columns, heard, texts_of
from t2i.conditions import encoders
from t2i.conditions.codes import CodesConfig
from t2i.conditions.hearing import DROPPED
from t2i.conditions.labels import LabelConfig
from t2i.conditions.layout import LayoutConfig
from t2i.conditions.pictures import EdgesConfig, HoleConfig, MapConfig, SmallerConfig
from t2i.conditions.text_features import TextFeaturesConfig
from t2i.conditions.vectors import VectorConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionConfig, DiffusionSampling
from t2i.pixels import resized, stacked, to_pixels
from t2i.priors.asking import CAPTION, PICTURE, Asking
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.mar import MARSampling
from t2i.priors.sampling import SamplingConfig
from t2i.protocol import Asked, Rows, Space
from t2i.random import keys_of, normals
from t2i.task import TRAIN, updates_of
from t2i.tokenizers.task import load_tokenizer
from t2i.values import as_floats, deviation_column
from t2i.vocabulary import TextVocabulary

PriorConfig = AutoregressiveConfig | DiffusionConfig  # or another: docs/adding-a-model.md
if not TYPE_CHECKING:
    PriorConfig = with_others(PriorConfig, "rescribe.priors")  # of other packages: docs/python.md
ConditionKind = (
    WordsConfig
    | TextFeaturesConfig
    | LabelConfig
    | VectorConfig
    | CodesConfig
    | LayoutConfig
    | SmallerConfig
    | MapConfig
    | EdgesConfig
    | HoleConfig
)

SamplingKind = SamplingConfig | DiffusionSampling | MARSampling  # how priors of each family draw
PAINTED = 8  # pictures by a checkpoint

encoders.fetched = cache.cached  # text encoders on s3://, once a node
encoders.asked = flops.asking


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """What a prior has to know beside its own sizes."""

    model: PriorConfig = setting(was=AutoregressiveConfig)
    space: Space
    conditions: tuple[ConditionKind, ...] = setting(was=WordsConfig)
    # Where conditions hear what other priors draw: by their names the ids of these spaces' tokenizers, or PICTURE.
    given: dict[str, str] = setting(default_factory=dict, since="0.2")

    def build(self, folder: str = "") -> Any:
        """The prior, a module that follows `Prior`; its weights are still to be filled.

        Its conditions find in `folder`, local or s3://, what they keep beside them.
        """
        prior = self.model.build(self.space, self.conditions)
        if folder:
            with storage.fetched(folder) as local:
                prior.conditions.load(local)
        return prior


@dataclass(frozen=True, kw_only=True)
class PriorTask:
    """Learn p(values | what is told) on the rows that the mixture keeps."""

    shape: PriorShape
    folder: str = ""  # of what the conditions keep, such as a vocabulary; none: they keep nothing
    styles: tuple[str, ...]  # of the captions that the mixture reads
    optim: OptimConfig
    drop: float = 0.1  # share of rows to which a condition's null is told, where its config does not say
    text_weight: float = 1 / 7  # of the caption's loss against that of the codes, where the model learns it
    seed: int = 0
    column: str = "codes"  # of the values; PICTURE: they are the picture itself
    deviations: bool = False  # of latents lie beside them: each epoch draws a row's anew
    cached: tuple[str, ...] = ()  # conditions whose features of every caption lie in columns
    decoder: str = ""  # where the tokenizer lies, for pictures to be seen while it trains; none: none are

    where_reads: tuple[str, ...] = ("split", "keep")
    bucket: str | None = None
    whole_weights: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Values, and what the conditions read: of captions all styles' with their shares, and all alt texts."""
        named = dict.fromkeys(name for condition in self.shape.conditions for name in condition.reads)
        if CAPTION in named:
            named = dict.fromkeys((*caption_columns(self.styles), *(name for name in named if name != CAPTION)))
        values = (self.column, deviation_column(self.column)) if self.deviations else (self.column,)
        return (*values, *(name for name in named if name not in values))

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split that the mixture keeps."""
        return (columns["split"] == TRAIN) & columns["keep"].astype(bool)

    def updates(self) -> list[Update]:
        """Those of the prior's turns."""
        weights = {"prior": {"text": self.text_weight}}
        return updates_of(self.shape.build(self.folder), {"prior": self.optim}, self.seed, weights)

    def picks(self, rows: dict[str, list], draw: Draw) -> Mapping[str, Sequence[str | None]]:
        """Of features of frozen text encoders those of the caption that a row hears."""
        asked = [each for each in self.shape.conditions if each.name in self.cached]
        heard = self._heard(rows, draw) if asked else []
        picked: dict[str, list[str]] = {}
        for condition in asked:
            assert isinstance(condition, TextFeaturesConfig)
            picked |= condition.picks(heard)
        return picked

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """`values`, the conditions' arrays, which of them are dropped, and a `noise_key` a row.

        Values are codes (B, N) int64, pixels (B, 3, h, w) uint8 of the space's size, or else (B, *shape) float32.
        """
        rows = self._told(rows, draw)
        keys = (draw("noise") * 2.0**53).astype(np.int64)
        arrays = {"values": self._values(rows[self.column]), "noise_key": keys}
        if self.deviations:
            noise = normals(torch.from_numpy(keys), self.shape.space.shape, "posterior").numpy()
            arrays["values"] += self._values(rows[deviation_column(self.column)]) * noise
        for condition, its_rows in zip(self.shape.conditions, _rows(self.shape.conditions, self.folder), strict=True):
            made = its_rows(rows, draw)
            if twice := sorted(arrays.keys() & made.keys()):
                raise ValueError(
                    f"The condition '{condition.name}' would write over '{twice[0]}': give it another name."
                )
            arrays |= made
            share = self.drop if condition.drop is None else condition.drop
            if share:
                arrays[DROPPED + condition.name] = draw(_salt(condition.name)) < share
        return arrays

    @property
    def paints(self) -> int:
        """Where there is a tokenizer to decode them."""
        return PAINTED if self.decoder else 0

    def asks(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """The conditions' arrays, of which nothing is dropped or corrupted, and the captions."""
        rows = self._told(rows, draw)
        prompts = rows.get(CAPTION, [""] * len(rows[self.column]))
        arrays = {"prompt": np.array(prompts, dtype=object)}
        for its_rows in _rows(self.shape.conditions, self.folder):
            arrays |= its_rows(rows, None)
        return arrays

    def paint(self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Pictures of what the prior draws from the seeds 0, 1, ..., without guidance."""
        prior: Any = modules["prior"]
        seeds = range(len(batch["weight"]))
        asked = Asked(len(seeds), {**batch, "noise_key": keys_of(seeds)})
        values = prior.sample(asked, seeds, _sampling(self.shape.model)())
        return to_pixels(_decoder(self.decoder).decode(values))

    def _values(self, rows: list) -> np.ndarray:
        space = self.shape.space
        if self.column == PICTURE:
            return stacked([resized(pixels, space.shape[1:]) for pixels in rows])  # type: ignore[arg-type]
        return np.stack(rows, dtype=np.int64) if space.codes else as_floats(rows).reshape(-1, *space.shape)

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """The prior, and what its conditions keep."""
        save_model(modules["prior"], str(Path(folder) / "model.safetensors"))
        Path(folder, "config.json").write_text(strict.dumps(to_dict(self.shape), indent=2) + "\n")
        if self.folder:
            with storage.fetched(self.folder) as kept:
                shutil.copytree(kept, folder, dirs_exist_ok=True)

    def _told(self, rows: dict[str, list], draw: Draw) -> dict[str, list]:
        """With the caption that each row hears, where a condition hears captions."""
        if not any(CAPTION in condition.reads for condition in self.shape.conditions):
            return rows
        return {**rows, CAPTION: texts_of(rows, self._heard(rows, draw))}

    def _heard(self, rows: Mapping[str, list], draw: Draw) -> list[tuple[str, int]]:
        """The style of the caption that each row hears and, of several alt texts, the place of the one."""
        several = any(texts is not None for texts in rows.get(ALTS, ()))
        places = pick(rows[ALTS], draw(ALT), rows[SHARES]) if several else None
        return heard(rows, self.styles, draw("caption"), places)


def _salt(name: str) -> str:
    return "drop" if name == WordsConfig.name else f"drop/{name}"


def load_prior(folder: str) -> tuple[Any, Asking]:
    """The prior in a folder, local or s3://, ready for use, and the way to ask it."""
    with cache.cached(folder) as local:
        shape, weights = _shape(local), str(Path(local) / "model.safetensors")
        prior = shape.build(local)
        if "space" in storage.read_json(storage.join(local, "config.json")):
            load_model(prior, weights)
        else:
            prior.load_state_dict({_RENAMED.get(name, name): value for name, value in load_file(weights).items()})
        return prior.eval().requires_grad_(False), _asking(shape, local)


def load_asking(folder: str) -> Asking:
    """The way to ask the prior in a folder, without its weights."""
    with cache.cached(folder) as local:
        return _asking(_shape(local), local)


def sampling_of(folder: str) -> type:
    """The class of the configs that say how the prior in a folder draws."""
    with cache.cached(folder) as local:
        return _sampling(_shape(local).model)


def _sampling(model: PriorConfig) -> type:
    return getattr(model, "sampling", SamplingConfig)


def _asking(shape: PriorShape, local: str) -> Asking:
    return Asking(shape.conditions, tuple(condition.rows(local) for condition in shape.conditions), shape.given)


def _shape(local: str) -> PriorShape:
    told = storage.read_json(storage.join(local, "config.json"))
    return from_dict(PriorShape, told) if "space" in told else _before_conditions(told)


def check_sizes(config: PriorConfig, sizes: Sequence[str]) -> None:
    """ValueError where pictures have several sizes, and a prior of this config knows one grid of codes alone."""
    if len(sizes) > 1 and not getattr(config, "several_grids", False):
        raise ValueError(
            f"The prior of {type(config).__name__} learns pictures of one size, but buckets give them "
            f"{len(sizes)} ({', '.join(sizes)}): train it on a corpus with an image_size; a tokenizer takes buckets."
        )


# Parameters of priors that were exported before there were conditions.
_RENAMED = {
    "text.weight": "conditions.each.text.words.weight",
    "text_position.weight": "conditions.each.text.places.weight",
}


def _before_conditions(told: Mapping[str, Any]) -> PriorShape:
    """The shape of a prior that was exported then: its words stood beside its own sizes."""
    words = WordsConfig(vocabulary_size=told["vocabulary_size"], length=told["text_length"])
    return PriorShape(
        model=from_dict(AutoregressiveConfig, told["model"]),
        space=Space(tuple(told["grid"]), codes=told["codebook_size"]),
        conditions=(words,),
    )


@lru_cache  # one a process: a feed collates many batches
def _rows(conditions: tuple[ConditionKind, ...], folder: str) -> tuple[Rows, ...]:
    with storage.fetched(folder) if folder else nullcontext("") as local:
        return tuple(condition.rows(local) for condition in conditions)


@lru_cache(1)
def _decoder(folder: str) -> Any:
    return load_tokenizer(folder)


def load_vocabulary(url: str) -> TextVocabulary:
    """Out of a folder, local or s3://."""
    with storage.fetched(url) as local:
        return TextVocabulary.load(local)


def save_vocabulary(vocabulary: TextVocabulary, url: str) -> None:
    """Into a folder, local or s3://."""
    with tempfile.TemporaryDirectory() as local:
        vocabulary.save(local)
        storage.upload(local, url)
