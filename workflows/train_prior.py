"""Train a text-to-image prior: the probability of an image's codes or pixels, given one of its captions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict, setting
from infra.data.ahead import ahead
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig, Trained
from infra.train.optim import OptimConfig
from t2i.conditions.encoders import TextEncoderConfig
from t2i.conditions.labels import LabelConfig
from t2i.conditions.layout import LayoutConfig
from t2i.conditions.text_features import FeatureSizes, TextFeaturesConfig, null_file
from t2i.conditions.words import WordsConfig
from t2i.priors.asking import PICTURE
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.task import (
    ALT,
    ALTS,
    ConditionKind,
    PriorConfig,
    PriorShape,
    PriorTask,
    check_sizes,
    load_vocabulary,
    save_vocabulary,
)
from t2i.protocol import Space
from t2i.task import TRAIN
from t2i.tokenizers.pixels import Pixels
from t2i.tokenizers.task import load_tokenizer
from t2i.vocabulary import FILE, TextVocabulary
from workflows.encode import space_of
from workflows.encode_text import NULL, anchored
from workflows.splits import demand_rows
from workflows.train_tokenizer import MODEL, decodes, image_sizes, losses_of, taken_of


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig:
    """Which prior, the words that it reads, and how long it learns."""

    model: PriorConfig = setting(default_factory=AutoregressiveConfig, was=AutoregressiveConfig)
    vocabulary_size: int = 8000  # at most
    vocabulary_rows: int = 1_000_000  # rows whose captions are read for it, at most
    text_length: int = 64  # word ids of a caption, at most
    drop: float = 0.1  # share of rows that are told a null, for classifier-free guidance (arXiv 2207.12598)
    text_weight: float = 1 / 7  # of the caption's loss against the codes', where the model learns captions too
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0  # of the first weights
    # What the prior is told; None: words of an own vocabulary, as the fields above say.
    conditions: tuple[ConditionKind, ...] | None = setting(None, since="0.2", was=WordsConfig)

    def __post_init__(self) -> None:
        if self.vocabulary_size < 64 or self.text_length < 1:
            raise ValueError("A prior needs a vocabulary of at least 64 entries and captions of at least 1 word.")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop is a share in [0, 1), but it is {self.drop}.")
        if sum(isinstance(each, WordsConfig) for each in self.conditions or ()) > 1:
            raise ValueError("A prior learns one vocabulary: give it one condition of words.")

    @property
    def trainings(self) -> list[Trained]:
        """The prior's."""
        return [Trained(self.train, {"prior": self.optim})]

    @property
    def told(self) -> tuple[ConditionKind, ...]:
        """The conditions, each with its own share of nulls."""
        words = WordsConfig(vocabulary_size=self.vocabulary_size, length=self.text_length)
        given = (words,) if self.conditions is None else self.conditions
        return tuple(replace(each, drop=self.drop) if each.drop is None else each for each in given)


@step(version=2)
def train_prior(
    config: TrainPriorConfig,
    mixture: Artifact,
    codes: Artifact | None,
    tokenizer: Artifact,
    *more: Artifact,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Train a prior on the captions of a mixture and the codes or latents of the same images, or their pixels.

    `more` are features of these captions by frozen text encoders, which are then not computed again, and codes of the
    images by other tokenizers, in columns of their own.
    """
    if codes is not None:
        check_sizes(config.model, list(codes.summary.get("grids", ())))
    images = mixture.inputs[0]
    if codes is None:
        space, column = _pixels(images, tokenizer), PICTURE
    else:
        space, column = space_of(codes), _column(codes)
    other = [each for each in more if each.step == "encode"]
    features = _features(mixture, [each for each in more if each not in other])
    inputs = _inputs(mixture, codes, tokenizer)
    inputs += [*_other_codes(images, column, other), *(each.path for each in features.values())]
    demand_rows(images)
    styles = tuple(style for style, weight in mixture.manifest["config"]["weights"].items() if weight > 0)
    folder = storage.join(out, "vocabulary")
    told = tuple(
        _with_features(each, features, styles, folder)
        if isinstance(each, TextFeaturesConfig)
        else _resolved(each, inputs, styles, config.vocabulary_rows, folder)
        for each in config.told
    )
    if unheard := features.keys() - {each.name for each in told if isinstance(each, TextFeaturesConfig)}:
        name = min(unheard)
        raise ValueError(f"No condition of the prior hears the features '{name}' of {features[name].path}.")
    if own := [each.name for each in told if codes and column in each.reads]:
        raise ValueError(
            f"The condition '{own[0]}' hears the column '{column}', which the prior is to draw: name another."
        )
    shape = PriorShape(model=config.model, space=space, conditions=told, given=_given(told, other))
    with torch.device("meta"):
        shape.build()  # a condition that the prior does not hear is told before anything starts
    task = PriorTask(
        shape=shape,
        folder=folder if storage.exists(folder) else "",
        styles=styles,
        optim=config.optim,
        text_weight=config.text_weight,
        seed=config.seed,
        column=column,
        deviations=codes is not None and codes.summary.get("deviations", False),
        cached=tuple(features),
        decoder=tokenizer.url(MODEL) if decodes(tokenizer) else "",
    )
    figures = fit([Training(task, inputs, config.train, out)], cluster, report)
    sizes = [each.vocabulary_size for each in told if isinstance(each, WordsConfig)]
    words = {"vocabulary": sizes[0]} if sizes else {}
    return {"steps": figures["step"], "rows": figures["rows"], **words, **losses_of(figures), **taken_of(figures)}


def _resolved(
    condition: ConditionKind, inputs: list[str], styles: tuple[str, ...], rows: int, folder: str
) -> ConditionKind:
    """The condition as it will be built: with the words, labels or classes of the rows that are trained on.

    The vocabulary of words is learned into `folder`, if it is not there.
    """
    if isinstance(condition, LabelConfig) and not condition.labels:
        return replace(condition, labels=_values(inputs, condition.column))
    if isinstance(condition, LayoutConfig) and not condition.classes:
        return replace(condition, classes=_values(inputs, "box_classes"))
    if not isinstance(condition, WordsConfig):
        return condition
    if not storage.exists(storage.join(folder, FILE)):
        words = TextVocabulary.train(captions_of(inputs, styles, rows), condition.vocabulary_size, condition.length)
        save_vocabulary(words, folder)
    return replace(condition, vocabulary_size=len(load_vocabulary(folder)))


def _features(mixture: Artifact, more: Sequence[Artifact]) -> dict[str, Artifact]:
    """Features of text encoders by name; ValueError where they are of other captions than those of the mixture."""
    features: dict[str, Artifact] = {}
    for each in more:
        if each.step != "encode_text":
            raise ValueError(f"{each.path} was made by {each.step}; a prior takes what encode and encode_text made.")
        name = each.summary["name"]
        if name in features:
            raise ValueError(f"{features[name].path} and {each.path} are both called '{name}'.")
        if [one.id for one in each.inputs] != [one.id for one in mixture.inputs[:2]]:
            raise ValueError(
                f"{each.path} are features of other captions than those of the mixture {mixture.path}: "
                f"encode {mixture.inputs[1].path}."
            )
        features[name] = each
    return features


def _other_codes(images: Artifact, column: str, other: Sequence[Artifact]) -> list[str]:
    """Codes by other tokenizers; ValueError where they are of other images, or two lie in one column."""
    columns = [column]
    for each in other:
        if each.inputs[0].id != images.id:
            raise ValueError(f"{each.path} are codes of other images than {images.path}.")
        if _column(each) in columns:
            raise ValueError(
                f"Codes of two tokenizers lie in the column '{_column(each)}': encode one of them into a column of its "
                "own, as --column map_codes does."
            )
        columns.append(_column(each))
    return [each.path for each in other]


def _given(told: Sequence[ConditionKind], other: Sequence[Artifact]) -> dict[str, str]:
    """What conditions hear that a chain draws, by their names: the ids of tokenizers, or PICTURE."""
    spaces = {PICTURE: PICTURE} | {_column(each): each.inputs[1].id for each in other}
    return {each.name: spaces[name] for each in told for name in each.reads if name in spaces}


def _pixels(images: Artifact, tokenizer: Artifact) -> Space:
    """The space of pixels; ValueError where the tokenizer has codes, or its pixels have other proportions."""
    model = load_tokenizer(tokenizer.url(MODEL))
    if not isinstance(model, Pixels):
        raise ValueError(
            f"{tokenizer.path} makes codes of pictures: give the `codes` that `encode` made with it of {images.path}."
        )
    for size in image_sizes(images):
        model.space(size)
    return model.space(model.config.size)


def _column(codes: Artifact) -> str:
    return codes.manifest["config"].get("column", "codes")


def _with_features(
    condition: TextFeaturesConfig, features: Mapping[str, Artifact], styles: tuple[str, ...], folder: str
) -> TextFeaturesConfig:
    """The condition with the encoder and the sizes of its features; their null is put into `folder`."""
    found = features.get(condition.name)
    if found is None:
        return replace(condition, encoder=anchored(condition.asked)).resolved()
    encoder = from_dict(TextEncoderConfig, found.summary["encoder"])
    if condition.encoder is not None and anchored(condition.encoder) != encoder:
        raise ValueError(
            f"The condition '{condition.name}' and {found.path} name two encoders, {condition.encoder} and {encoder}. "
            "Leave the condition's out."
        )
    if missing := [style for style in styles if style not in found.summary["styles"]]:
        raise ValueError(
            f"The mixture reads captions of the style '{missing[0]}', but {found.path} has no features of them."
        )
    storage.write_bytes(storage.join(folder, null_file(condition.name)), storage.read_bytes(found.url(NULL)))
    return replace(condition, encoder=encoder, sizes=from_dict(FeatureSizes, found.summary["sizes"]))


def _values(inputs: list[str], column: str) -> tuple[str, ...]:
    """All that a column of words, or of lists of words, says of the rows that are trained on, sorted."""

    def read(shard: str) -> set[str]:
        columns = ShardReader(inputs, shard).columns(["split", "keep", column])
        values = columns[column][(columns["split"] == TRAIN) & columns["keep"].astype(bool)]
        return {
            word for value in values if value is not None for word in ([value] if isinstance(value, str) else value)
        }

    found = set[str]().union(*ahead(read, joined_names(inputs), threads=8))
    if not found - {None}:
        raise ValueError(
            f"No row that is trained on has a {column}: ingest with --conditions that say where it stands."
        )
    return tuple(sorted(found - {None}))


def _inputs(mixture: Artifact, codes: Artifact | None, tokenizer: Artifact) -> list[str]:
    """The artifacts whose columns are joined: the index, captions, their shares and, where there are some, codes."""
    images, captions = mixture.inputs[:2]
    if codes is None:
        return [images.path, captions.path, mixture.path]
    encoded, by = codes.inputs
    if encoded.id != images.id:
        raise ValueError(f"{codes.path} are codes of other images than those of the mixture {mixture.path}.")
    if by.id != tokenizer.id:
        raise ValueError(f"{codes.path} are codes of the tokenizer {by.path}, not of {tokenizer.path}.")
    return [images.path, captions.path, mixture.path, codes.path]


def captions_of(inputs: list[str], styles: tuple[str, ...], rows: int) -> Iterator[str]:
    """Captions of the training rows that the mixture keeps."""
    names = [f"caption_{style}" for style in styles]
    for shard in joined_names(inputs):
        several = [ALTS] if f"caption_{ALT}" in names else []
        columns = ShardReader(inputs, shard).columns(["split", "keep", *several, *names])
        kept = ((columns["split"] == TRAIN) & columns["keep"].astype(bool)).nonzero()[0][:rows]
        for name in names:
            yield from (text for text in columns[name][kept] if text)
        for texts in columns[ALTS][kept] if several else ():
            yield from () if texts is None else texts[1:]
        rows -= len(kept)
        if rows <= 0:
            return
