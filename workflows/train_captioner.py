"""Train a captioner: a vocabulary, a base on the corpus's own captions, then a filter and a decoder for each style."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from captioner.altered import Alternatives
from captioner.backends.endpoint import EndpointConfig
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.vllm import VLLMConfig
from captioner.matching import MatchingConfig
from captioner.model import CaptionerConfig
from captioner.styles import DESCRIPTIVE, SHORT, Style, prompts_of
from captioner.task import (
    ALT_COLUMN,
    ALTS_COLUMN,
    TRAIN,
    BaseTask,
    FilterTask,
    FinetuneTask,
    load_captioner,
    present,
    reference_column,
)
from captioner.vocabulary import Vocabulary, train_vocabulary
from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict
from infra.data.shards import ShardReader, shard_names
from infra.metrics import Report
from infra.store import Artifact, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig, Trained, is_loss
from infra.train.optim import OptimConfig
from workflows.splits import demand_rows
from workflows.train_tokenizer import taken_of

UNTOLD = "have no alt text, which a base and a filter learn from: give texts, or published weights and no `base`"
Backend = TransformersConfig | EndpointConfig | VLLMConfig  # somebody else's model
MODEL = "model"  # the folder, within the artifact, of what users load


@dataclass(frozen=True, kw_only=True)
class TrainCaptionerConfig:
    """What a captioner starts from, and how long it learns.

    `model` is the size of one that starts from nothing, or published BLIP weights (a folder in the Hugging Face layout
    or a name on its hub). The fine-tuning branches one decoder a style off the base, on the training rows that have a
    `reference_<style>`; without styles the base is all. Another model of transformers, of vLLM or of a server is only
    named here, for `recaption` to ask: nothing is trained, so `base` and `filter` are None, and there are no styles.
    """

    model: CaptionerConfig | str | TransformersConfig | EndpointConfig | VLLMConfig = field(
        default_factory=CaptionerConfig
    )
    vocabulary_size: int = 4000  # at most; of a captioner that starts from nothing
    vocabulary_rows: int = 1_000_000  # rows whose captions are read for it, at most
    base: TrainConfig | None = field(default_factory=lambda: TrainConfig(steps=1000))  # None: only fine-tune
    base_optim: OptimConfig = field(default_factory=OptimConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)  # further losses of the base; off by default
    filter: TrainConfig | None = None  # the matching head's own training, after the base's; None: it has none
    filter_optim: OptimConfig = field(default_factory=lambda: OptimConfig(warmup_steps=20))
    filter_matching: MatchingConfig = field(default_factory=lambda: MatchingConfig(match=1, hard=0, altered=True))
    finetune: TrainConfig = field(default_factory=lambda: TrainConfig(steps=150))
    finetune_optim: OptimConfig = field(default_factory=lambda: OptimConfig(warmup_steps=20))
    styles: tuple[Style, ...] = (SHORT, DESCRIPTIVE)
    seed: int = 0  # of the first weights

    def __post_init__(self) -> None:
        if self.vocabulary_size < 64:
            raise ValueError(f"A vocabulary of {self.vocabulary_size} entries is too small; give at least 64.")
        if isinstance(self.model, Backend) and (self.base or self.filter or self.styles):
            raise ValueError(
                f"{self.model.model} is somebody else's model, which is not trained here: give base None, filter None "
                "and no styles."
            )
        if self.base is None and isinstance(self.model, CaptionerConfig):
            raise ValueError("A captioner that starts from nothing needs a base training; give `base`.")
        if self.filter is not None and not self.filter_matching.match:
            raise ValueError(
                "A filter is a matching head: give `filter_matching` a weight for `match`, or no `filter`."
            )
        names = [style.name for style in self.styles]
        if len(set(names)) < len(names) or "alt" in names:
            raise ValueError(f"Styles need names of their own, other than 'alt'; found {', '.join(names)}.")

    @property
    def trainings(self) -> list[Trained]:
        """What is trained, in turn."""
        steps = {
            "base": (self.base, self.base_optim),
            "filter": (self.filter, self.filter_optim),
            "finetune": (self.finetune if self.styles else None, self.finetune_optim),
        }
        return [Trained(train, {name: optim}) for name, (train, optim) in steps.items() if train is not None]


def told(config: TrainCaptionerConfig, inputs: Sequence[Artifact], made: Artifact | None) -> list[str]:
    """For a plan: that nothing is trained where somebody else's model is only named."""
    return [f"nothing is trained: {config.model.model} is only named"] if isinstance(config.model, Backend) else []


@step(version=1, told=told)
def train_captioner(
    config: TrainCaptionerConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Train a captioner on a corpus and its labelled rows as DALL-E 3 did: a base, then a decoder a style from it.

    Where `model` is somebody else's, it is only named.
    """
    if isinstance(config.model, Backend):
        return {"model": config.model.model, "styles": []}
    if config.base is not None or config.filter is not None:
        demand_rows(images, lambda columns: present(columns[ALT_COLUMN]), (ALT_COLUMN,), UNTOLD)
    elif config.styles:
        demand_rows(images)
    vocabulary, image_size, max_length = _prepare(config, config.model, images, out)
    for style in config.styles:
        prompts_of(style, [], vocabulary, max_length)  # a style without room is said before the base is trained
    source: CaptionerConfig | str = _source(config.model)
    asked = [config.matching] * (config.base is not None) + [config.filter_matching] * (config.filter is not None)
    alternatives = _alternatives(config, images, vocabulary) if any(each.altered for each in asked) else None
    trainings = []
    if config.base is not None:
        base = BaseTask(
            source=source,
            vocabulary=vocabulary,
            image_size=image_size,
            max_length=max_length,
            optim=config.base_optim,
            matching=config.matching,
            alternatives=alternatives if config.matching.altered else None,
            seed=config.seed,
        )
        trainings.append(Training(base, [images.path], config.base, storage.join(out, "base")))
        source = storage.join(out, "base", MODEL)
    assert isinstance(source, str)
    if config.filter is not None:
        judge = FilterTask(
            source=source,
            styles=config.styles,
            vocabulary=vocabulary,
            image_size=image_size,
            max_length=max_length,
            optim=config.filter_optim,
            matching=config.filter_matching,
            alternatives=alternatives if config.filter_matching.altered else None,
            seed=config.seed,
        )
        trainings.append(Training(judge, [images.path], config.filter, storage.join(out, "filter")))
        source = storage.join(out, "filter", MODEL)
    if config.styles:
        _demand_references(config.styles, images)
        finetune = FinetuneTask(
            source=source,
            styles=config.styles,
            vocabulary=vocabulary,
            image_size=image_size,
            max_length=max_length,
            optim=config.finetune_optim,
        )
        trainings.append(Training(finetune, [images.path], config.finetune, storage.join(out, "finetune")))
        source = storage.join(out, "finetune", MODEL)
    figures = fit(trainings, cluster, report)
    with tempfile.TemporaryDirectory() as folder:  # weights as they were published become a captioner of ours
        load_captioner(source).save(folder)
        storage.upload(folder, storage.join(out, MODEL))
    losses = {name.replace("/", "_"): value for name, value in figures.items() if is_loss(name)}
    styles = [style.name for style in config.styles]
    return {"vocabulary": len(vocabulary), "styles": styles, **losses, **taken_of(figures)}


def named(captioner: Artifact) -> Backend | None:
    """Somebody else's model, where the artifact only names one."""
    model = from_dict(TrainCaptionerConfig, captioner.manifest["config"]).model
    return model if isinstance(model, Backend) else None


def _prepare(
    config: TrainCaptionerConfig, model: CaptionerConfig | str, images: Artifact, out: str
) -> tuple[Vocabulary, tuple[int, int], int]:
    """The vocabulary, the image size and the longest sequence of the captioner to be."""
    if isinstance(model, str):
        captioner = load_captioner(model)
        return captioner.vocabulary, captioner.image_size, captioner.max_length
    folder = storage.join(out, "vocabulary")
    if not storage.exists(storage.join(folder, "tokenizer.json")):
        with tempfile.TemporaryDirectory() as local:
            train_vocabulary(_captions(config, images), config.vocabulary_size).save(local)
            storage.upload(local, folder)
    with storage.fetched(folder) as local:
        return Vocabulary.load(local), model.vision.image_size, model.text.max_length


def _captions(config: TrainCaptionerConfig, images: Artifact) -> Iterator[str]:
    """Captions of the training split, alt texts and references."""
    names = [ALT_COLUMN, *(reference_column(style) for style in config.styles)]
    left = config.vocabulary_rows
    for shard in shard_names(images.path):
        columns = ShardReader([images.path], shard).columns(["split", ALTS_COLUMN, *names])
        rows = (columns["split"] == TRAIN).nonzero()[0][:left]
        left -= len(rows)
        for name in names:
            yield from (text for text in columns[name][rows] if text)
        for texts in columns[ALTS_COLUMN][rows]:
            yield from () if texts is None else texts[1:]
        if not left:
            return


def _alternatives(config: TrainCaptionerConfig, images: Artifact, vocabulary: Vocabulary) -> Alternatives:
    """What stands between the same neighbours in the captions that the vocabulary would be made of."""
    lines = ([vocabulary.bos, *vocabulary.encode([text])[0], vocabulary.sep] for text in _captions(config, images))
    return Alternatives.count(lines, barred={vocabulary.unk})


def _demand_references(styles: tuple[Style, ...], images: Artifact) -> None:
    missing = {reference_column(style) for style in styles}
    for shard in shard_names(images.path):
        columns = ShardReader([images.path], shard).columns(["split", *missing])
        training = columns["split"] == TRAIN
        missing -= {name for name in missing if any(columns[name][training])}
        if not missing:
            return
    raise ValueError(
        f"No training row of {images.path} has a caption in {', '.join(sorted(missing))}. "
        "Label some rows, or leave the style out of the captioner's `styles`."
    )


def _source(model: CaptionerConfig | str) -> CaptionerConfig | str:
    # Workers may run in another folder than the command did.
    return storage.anchored(model) if isinstance(model, str) else model
