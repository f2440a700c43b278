"""Draw pictures for prompts: captions of held-out images, or a user's own."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from infra import storage, strict
from infra.cluster import Cluster
from infra.config import from_dict, setting
from infra.data.images import encode_png
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, step
from t2i.conditions.words import WordsRows
from t2i.pixels import to_pixels
from t2i.priors.asking import CAPTION, Asking
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import load_prior
from t2i.tokenizers.task import load_tokenizer
from workflows.commands import say
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
    mixture: Artifact | None,
    prior: Artifact,
    tokenizer: Artifact,
    *,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Write a PNG a prompt, and `samples.json`: prompt, image, scene and sample id of each.

    The mixture, of which held-out captions are taken, is not wanted where there are prompts.
    """
    if mixture is None and not config.prompts:
        raise ValueError("Say what to draw: give prompts, or a mixture, whose held-out captions stand for them.")
    prompts = [Prompt(text) for text in config.prompts]
    if mixture is not None and not prompts:
        prompts = prompts_of(mixture, config.count)
    model, ask = load_prior(prior.url(MODEL))
    decoder = load_tokenizer(tokenizer.url(MODEL))
    unknown = _unknown(config, ask)
    beside = [name for name in ask.reads if name != CAPTION]
    written = []
    for start in range(0, len(prompts), config.batch):
        part = prompts[start : start + config.batch]
        seeds = [config.seed * 2**32 + start + row for row in range(len(part))]
        columns = {name: [value] * len(part) for name, value in config.told.items()}
        if mixture is not None and not config.prompts:
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
    drawn = {"guidance": config.sampling.guidance, "temperature": config.sampling.temperature}
    return {"samples": len(written), **drawn} | ({"unknown_words": unknown} if unknown else {})


def as_trained(config: SampleConfig, prior: Artifact, given: Collection[str]) -> SampleConfig:
    """With the sampling of the recipe that trained the prior, but for the fields of it that are `given`.

    The prior does not know its recipe; the newest pictures of held-out captions beside it do, which a recipe ends with.
    """
    root, drawn = prior.path.rsplit("/", 2)[0], list[Artifact]()
    for name in storage.list_names(storage.join(root, sample.name)):
        with suppress(FileNotFoundError):  # it was cut
            drawn.append(Artifact.open(storage.join(root, sample.name, name)))
    by_recipes = [
        made
        for made in drawn
        if not made.manifest["config"]["prompts"]
        and any(path.endswith(f"{prior.step}/{prior.id}") for path in made.manifest["inputs"])
    ]
    if not by_recipes:
        return config
    newest = max(by_recipes, key=lambda made: made.manifest["started"])
    sampling = from_dict(SampleConfig, newest.manifest["config"]).sampling
    sampling = replace(sampling, **{name: getattr(config.sampling, name) for name in given})
    say(f"Drawn as {newest.path} was: guidance {sampling.guidance:g}, temperature {sampling.temperature:g}.")
    return replace(config, sampling=sampling)


def _unknown(config: SampleConfig, ask: Asking) -> list[str]:
    """Words of a user's prompts that the prior's vocabulary does not have, which is told."""
    texts = [*config.prompts, config.negative] if config.prompts else []
    known = [rows.vocabulary for rows in ask.rows if isinstance(rows, WordsRows)]
    unknown = list(dict.fromkeys(word for vocabulary in known for word in vocabulary.unknown(texts)))
    if unknown:
        words = " nor ".join(f"'{word}'" for word in unknown)
        say(f"This prior's vocabulary has no word {words}: it reads pieces, and may not know what they mean.")
    return unknown


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
    say("No held-out row has a caption, so the prompts are those of training rows.")
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
