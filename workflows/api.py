"""What `import rescribe` offers: models that draw or describe pictures, and the rows of artifacts as a table."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image

from captioner.backends.stages import CaptionWith
from captioner.backends.vllm import VLLMConfig
from captioner.stages import Caption
from captioner.styles import Style
from captioner.task import ALT_COLUMN
from captioner.tower import Tower
from infra import storage
from infra.data.images import decode, pixels_of
from infra.data.ledger import LEDGER
from infra.data.shards import ShardReader, joined_names
from infra.store import MANIFEST, Artifact
from t2i.clip.embedder import Embedder
from t2i.pixels import to_pixels
from t2i.priors.asking import CAPTION
from t2i.priors.task import load_prior, sampling_of
from t2i.tokenizers.task import load_tokenizer
from workflows import asked
from workflows.commands import choose
from workflows.lookup import MAKERS, contents, current, furthest, one, only
from workflows.sample import SampleConfig, as_trained
from workflows.train_captioner import MODEL, Backend, TrainCaptionerConfig, named
from workflows.train_clip import train_clip

ROW = ("sample_id", "state", "reason")


def load(path: str, model: str = "", key_variable: str = "") -> Any:
    """A `Painter` of a trained prior, an `Embedder` of a trained CLIP, or a `Captioner`.

    `path` is the folder of an artifact, or of a step or a store that holds one such (ValueError with all, where it
    holds several); or who captions, in a word: BLIP weights or another model of transformers by folder or hub's name,
    or a server's address with the `model` there and the environment's variable that has its key.
    """
    served = path.startswith(("http://", "https://"))
    if not served and (contents(path) or storage.exists(storage.join(path, MANIFEST))):
        kinds = (*MAKERS["prior"], *MAKERS["captioner"], train_clip.name)
        artifact = one(path, kinds, lambda place: f"rescribe.load({place!r})")
        if artifact.step in MAKERS["prior"]:
            return Painter(artifact)
        if artifact.step == train_clip.name:
            return Embedder(artifact.url(MODEL))
        return Captioner(named(artifact) or artifact.url(MODEL))
    if served and not model:
        raise ValueError(f'Name the model that {path} is to caption with: rescribe.load({path!r}, model="NAME").')
    config = asked.captioner_of(path, model, key_variable)
    assert isinstance(config, TrainCaptionerConfig), "an artifact was found above"
    assert isinstance(config.model, str | Backend)
    return Captioner(config.model)


def open(path: str) -> "Rows":
    """The rows of an artifact, by its folder or that of a step or a store; of several in one the furthest derived.

    FileNotFoundError where there is none that has rows, ValueError with a line for each where several fit.
    """
    there = [each for each in current(path, ()) if _has_rows(each)]
    found = furthest([each for each in there if not each.has_own_rows] or there)  # pictures that were drawn come last
    if not found:
        raise FileNotFoundError(f"{path} holds no rows: give what ingest, recaption, mix or encode made.")
    return Rows(only(found, path, lambda place: f"rescribe.open({place!r})"))


class Painter:
    """A trained prior and its tokenizer. `sampling` is how its recipe draws, else the default."""

    def __init__(self, prior: Artifact) -> None:
        (tokenizer,) = (each for each in prior.inputs if each.step in MAKERS["tokenizer"])
        self._prior, self._ask = load_prior(prior.url(MODEL))
        self._tokenizer = load_tokenizer(tokenizer.url(MODEL))
        default = SampleConfig(sampling=sampling_of(prior.url(MODEL))())
        self.sampling = as_trained(default, prior, ()).sampling

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        negative: str = "",
        told: dict[str, str] | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """A picture (Pillow, RGB) of each prompt, the same that `rescribe sample` draws for them with this seed.

        `told` is what the prior hears beside captions, as `class_label`; `sampling` are fields of `self.sampling`,
        as `guidance`. ValueError for another name, and where the prior hears what nobody told.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            return []
        seeds = [seed * 2**32 + row for row in range(len(texts))]
        columns = {CAPTION: texts, **{name: [value] * len(texts) for name, value in (told or {}).items()}}
        heard = self._ask(columns, seeds, [negative] * len(texts) if negative else [])
        for name in sampling:
            choose(name, {each.name: each for each in fields(self.sampling)}, "field of sampling")
        values = self._prior.sample(heard, seeds, replace(self.sampling, **sampling))
        return [Image.fromarray(pixels) for pixels in to_pixels(self._tokenizer.decode(values))]


class Captioner:
    """Weights of ours or of BLIP in a folder or on the hub, or somebody else's model; on a GPU where there is one."""

    def __init__(self, source: str | Backend) -> None:
        if isinstance(source, VLLMConfig):
            raise ValueError("vLLM runs in Ray's actors alone: use `rescribe recaption --captioner vllm:NAME`.")
        self._source, self._gpus = source, float(torch.cuda.is_available())
        self._tower = Tower(source, gpus=self._gpus) if isinstance(source, str) else None
        self.styles: tuple[Style, ...] = (asked.SHORT, asked.DESCRIPTIVE)
        if self._tower is not None:
            self._tower.setup()
            self.styles = self._tower.model.styles or (Style(name="short"),)
        self._stages: dict[Style, Caption | CaptionWith] = {}

    def caption(self, images: Any, style: str | Style = "") -> list[str]:
        """What is said of each picture: Pillow images, arrays (see `pixels_of`), or paths, local or s3://.

        Transparency lies on white, whatever it comes in.
        `style` is the name of one of `styles`, of which the first is the default, or a `Style` of one's own.
        RuntimeError where somebody else's model has no answer, ValueError for a style or a picture that cannot be.
        """
        pictures = [_pixels(each) for each in (images if isinstance(images, list | tuple) else [images])]
        chosen = self._style(style)
        if not pictures:
            return []
        if chosen not in self._stages:
            self._stages[chosen] = stage = self._stage(chosen)
            stage.setup()
        batch: dict[str, list] = {"pixels": pictures, ALT_COLUMN: [None] * len(pictures)}
        if self._tower is not None:
            batch[self._tower.view] = [self._tower.fit(each) for each in pictures]
        columns = self._stages[chosen](batch)
        for state in columns.get("state", ()):
            if isinstance(state, Exception):
                raise state
        if reasons := [reason for reason in columns.get("reason", ()) if reason]:
            raise RuntimeError(reasons[0])
        return columns[f"caption_{chosen.name}"]

    def _style(self, style: str | Style) -> Style:
        if isinstance(style, Style):
            return style
        known = {each.name: each for each in self.styles}
        if style and style not in known:
            raise ValueError(f"This captioner has no style '{style}'; it has {', '.join(known)}. Or give a Style.")
        return known[style] if style else self.styles[0]

    def _stage(self, style: Style) -> Caption | CaptionWith:
        if self._tower is not None:
            return Caption(self._tower, (style,), gpus=self._gpus, score_alt=False)
        assert not isinstance(self._source, str | VLLMConfig)
        return CaptionWith(self._source, (style,), gpus=self._gpus)


@dataclass(frozen=True)
class Rows:
    """All rows of an artifact, in the order of the corpus, with the columns of what it was made of."""

    artifact: Artifact

    @property
    def columns(self) -> list[str]:
        """The names that `to_pandas` takes."""
        inputs = _rows_of(self.artifact)
        readers = (ShardReader(inputs, name, every=True) for name in joined_names(inputs))
        return sorted(set[str]().union(*(reader.names for reader in readers)).union(ROW))

    def to_pandas(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """A row a sample: `sample_id`, `state`, `reason` and `columns`; none: all but the index's copies of pictures.

        A column that several artifacts have comes from the last. ValueError for a column that none has.
        """
        inputs = _rows_of(self.artifact)
        readers = [ShardReader(inputs, name, every=True) for name in joined_names(inputs)]
        known = set[str]().union(*(reader.names for reader in readers)).difference(ROW)
        wanted = [name for name in columns if name not in ROW] if columns else sorted(known - {"image"})
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(f"There is no column '{missing[0]}'; there are {', '.join(sorted(known))}.")
        tables = []
        for reader in readers:  # a column that no row of a shard needs may lack there
            table = reader.table([name for name in wanted if name in reader.names], np.arange(len(reader)))
            for name, values in zip(ROW, (reader.sample_ids, reader.states, reader.reasons), strict=True):
                table = table.append_column(name, pa.array(values, pa.string()))
            tables.append(table)
        return pa.concat_tables(tables, promote_options="permissive").select([*ROW, *wanted]).to_pandas()


def _has_rows(artifact: Artifact) -> bool:
    return LEDGER in artifact.manifest.get("files", {})


def _rows_of(artifact: Artifact) -> list[str]:
    """The folder of an artifact after those of all that its rows were made of."""
    if artifact.has_own_rows:
        return [*artifact.rows_of, artifact.path]
    before = [path for made_of in artifact.inputs if _has_rows(made_of) for path in _rows_of(made_of)]
    return [*dict.fromkeys(before), artifact.path]


def _pixels(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a picture, as a captioner is shown it."""
    if not isinstance(image, str | os.PathLike):
        return pixels_of(image)
    path = os.fspath(image)
    try:
        return decode(storage.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
