"""Draw pictures for prompts: captions of held-out images, or a user's own."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from infra import storage, strict
from infra.cluster import Cluster
from infra.config import setting
from infra.data.images import encode_png
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, step
from t2i.pixels import to_pixels
from t2i.priors.asking import CAPTION
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import load_prior
from t2i.tokenizers.task import load_tokenizer
from workflows.held_out import first_held_out
from workflows.judge import TEST, TRAIN
from workflows.train_tokenizer import MODEL

SAMPLES = "samples.json"
KNOWN = ("reference_descriptive", "reference_short", "caption_alt")  # captions that a corpus comes with, the best first


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How many pictures, of what, and how they are drawn."""

    count: int = 256  # prompts, taken from the rows of the `test` split: the first by sample id
    prompts: tuple[str, ...] = ()  # these instead
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: int = 64  # pictures drawn together; it does not change them
    seed: int = 0
    negative: str = setting("", since="0.2")  # a prompt of what is not wanted, where guidance else puts the null
    told: dict[str, str] = setting(default_factory=dict, since="0.2")  # of prompts of one's own: class_label = cat

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1:
            raise ValueError(f"count and batch must be at least 1, but they are {self.count} and {self.batch}.")
        if self.negative and self.sampling.guidance == 1:
            raise ValueError("A negative prompt is what guidance moves away from: give sampling.guidance above 1, too.")
        if self.told and not self.prompts:
            raise ValueError("What held-out rows tell beside their captions is their own: `told` goes with prompts.")


@dataclass(frozen=True)
class Prompt:
    """A text, and the scene that a picture of it ought to show, where that is known."""

    text: str
    scene: str | None = None
    sample_id: str | None = None
    place: tuple[str, int] | None = None  # its shard, and its row there


@step(version=2)
def sample(
    config: SampleConfig,
    mixture: Artifact,
    prior: Artifact,
    tokenizer: Artifact,
    *,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Write a PNG a prompt, and `samples.json`: prompt, image, scene and sample id of each."""
    prompts = [Prompt(text) for text in config.prompts] or prompts_of(mixture, config.count)
    model, ask = load_prior(prior.url(MODEL))
    decoder = load_tokenizer(tokenizer.url(MODEL))
    beside = [name for name in ask.reads if name != CAPTION]
    written = []
    for start in range(0, len(prompts), config.batch):
        part = prompts[start : start + config.batch]
        seeds = [config.seed * 2**32 + start + row for row in range(len(part))]
        columns = {name: [value] * len(part) for name, value in config.told.items()}
        if not config.prompts:
            columns = _beside(mixture, part, beside)
        negative = [config.negative] * len(part) if config.negative else []
        asked = ask({CAPTION: [prompt.text for prompt in part], **columns}, seeds, negative)
        values = model.sample(asked, seeds, config.sampling)
        for prompt, image in zip(part, to_pixels(decoder.decode(values)), strict=True):
            name = f"images/{len(written):05d}.png"
            storage.write_bytes(storage.join(out, name), encode_png(image))
            written.append({"prompt": prompt.text, "image": name, "scene": prompt.scene, "sample_id": prompt.sample_id})
        report(len(written), len(prompts), "pictures")
    storage.write_bytes(storage.join(out, SAMPLES), strict.dumps(written, indent=1).encode())
    return {"samples": len(written), "guidance": config.sampling.guidance, "temperature": config.sampling.temperature}


def prompts_of(mixture: Artifact, count: int) -> list[Prompt]:
    """Captions of held-out rows: references and alt texts, else those that were written anew.

    Where no row is held out, as in a small corpus may be, those of training rows, which is told.
    """
    images, captions = mixture.inputs[:2]
    written = [f"caption_{style}" for style in sorted(mixture.manifest["config"]["weights"])]
    if rows := held_out(images, count) or held_out(images, count, written, [captions]):
        return rows
    names = [*KNOWN, *written]
    every = (_read(shard, TRAIN, names, [images, captions]) for shard in joined_names([images.path]))
    if not (rows := list(islice(chain.from_iterable(every), count))):
        raise ValueError(f"No row of {images.path} has a caption to draw a picture for. Give prompts of your own.")
    print("No held-out row has a caption, so the prompts are those of training rows.", file=sys.stderr, flush=True)
    return rows


def held_out(
    images: Artifact, count: int, names: Sequence[str] = KNOWN, beside: Sequence[Artifact] = ()
) -> list[Prompt]:
    """The first test rows by sample id, a fair and fixed draw, each by the first of some columns that has a caption."""
    read = partial(_read, split=TEST, names=names, inputs=[images, *beside])
    return first_held_out(images, count, read, lambda prompt: prompt.sample_id or "")


def _read(shard: str, split: str, names: Sequence[str], inputs: Sequence[Artifact]) -> Iterator[Prompt]:
    """The prompts of a shard's rows; their places are among the rows that the first of the artifacts accepted."""
    columns = ShardReader([each.path for each in inputs], shard).columns(["sample_id", "split", "scene", *names])
    ids = columns["sample_id"]
    own = ShardReader([inputs[0].path], shard).columns(["sample_id"])["sample_id"] if len(inputs) > 1 else ids
    place = {sample_id: row for row, sample_id in enumerate(own)}
    for row in np.flatnonzero(columns["split"] == split):
        if text := next((columns[name][row] for name in names if columns[name][row]), None):
            yield Prompt(text, columns["scene"][row], ids[row], (shard, place[ids[row]]))


def _beside(mixture: Artifact, prompts: Sequence[Prompt], names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of the rows that prompts came from, for conditions that hear more than a caption."""
    told: dict[str, list[Any]] = {name: [None] * len(prompts) for name in names}
    places = [prompt.place for prompt in prompts if prompt.place is not None] if names else []
    for shard in dict.fromkeys(shard for shard, _ in places):  # each is opened once
        mine = [number for number, place in enumerate(places) if place[0] == shard]
        found = ShardReader([mixture.inputs[0].path], shard).rows(names, [places[number][1] for number in mine])
        for name in names:
            for number, value in zip(mine, found[name], strict=True):
                told[name][number] = value
    return told
