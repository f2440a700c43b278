"""Train a text-to-image prior: the probability of an image's codes, given one of its captions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from infra import storage
from infra.cluster import Cluster
from infra.config import setting
from infra.data.shards import ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, step
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.task import (
    ALT,
    ALTS,
    TRAIN,
    PriorConfig,
    PriorShape,
    PriorTask,
    check_sizes,
    load_vocabulary,
    save_vocabulary,
)
from t2i.vocabulary import FILE, TextVocabulary
from workflows.splits import demand_rows
from workflows.train_tokenizer import losses_of


@dataclass(frozen=True, kw_only=True)
class TrainPriorConfig:
    """Which prior, the words that it reads, and how long it learns."""

    model: PriorConfig = setting(default_factory=AutoregressiveConfig, was=AutoregressiveConfig)
    vocabulary_size: int = 8000  # at most
    vocabulary_rows: int = 1_000_000  # rows whose captions are read for it, at most
    text_length: int = 64  # word ids of a caption, at most
    drop: float = 0.1  # share of captions that are dropped, for classifier-free guidance
    text_weight: float = 1 / 7  # of the caption's loss against the codes', where the model learns captions too
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000))
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0  # of the first weights

    def __post_init__(self) -> None:
        if self.vocabulary_size < 64 or self.text_length < 1:
            raise ValueError("A prior needs a vocabulary of at least 64 entries and captions of at least 1 word.")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop is a share in [0, 1), but it is {self.drop}.")


@step(version=1)
def train_prior(
    config: TrainPriorConfig,
    mixture: Artifact,
    codes: Artifact,
    tokenizer: Artifact,
    *,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Train a prior on the captions of a mixture and the codes of the same images."""
    check_sizes(config.model, list(codes.summary.get("grids", ())))
    inputs = _inputs(mixture, codes, tokenizer)
    demand_rows(mixture.inputs[0])
    styles = tuple(style for style, weight in mixture.manifest["config"]["weights"].items() if weight > 0)
    vocabulary = storage.join(out, "vocabulary")
    if not storage.exists(storage.join(vocabulary, FILE)):
        captions = _captions(inputs, styles, config.vocabulary_rows)
        save_vocabulary(TextVocabulary.train(captions, config.vocabulary_size, config.text_length), vocabulary)
    words = load_vocabulary(vocabulary)
    shape = PriorShape(
        model=config.model,
        vocabulary_size=len(words),
        text_length=config.text_length,
        codebook_size=codes.summary["codebook_size"],
        grid=tuple(codes.summary["grid"]),
    )
    task = PriorTask(
        shape=shape,
        vocabulary=vocabulary,
        styles=styles,
        optim=config.optim,
        drop=config.drop,
        text_weight=config.text_weight,
        seed=config.seed,
    )
    figures = fit([Training(task, inputs, config.train, out)], cluster, report)
    return {"steps": figures["step"], "rows": figures["rows"], "vocabulary": len(words), **losses_of(figures)}


def _inputs(mixture: Artifact, codes: Artifact, tokenizer: Artifact) -> list[str]:
    """The artifacts whose columns are joined: the index, captions, their shares, codes."""
    images, captions = mixture.inputs[:2]
    encoded, by = codes.inputs
    if encoded.id != images.id:
        raise ValueError(f"{codes.path} are codes of other images than those of the mixture {mixture.path}.")
    if by.id != tokenizer.id:
        raise ValueError(f"{codes.path} are codes of the tokenizer {by.path}, not of {tokenizer.path}.")
    return [images.path, captions.path, mixture.path, codes.path]


def _captions(inputs: list[str], styles: tuple[str, ...], rows: int) -> Iterator[str]:
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
