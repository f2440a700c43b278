"""What a training will cost, in FLOPs, before there is a corpus: so that recipes of several models get equal sums.

`steps_for` counts a step of the very task that is trained, on made-up pictures and given captions, in this process. A
recipe does not call it: it writes down the steps that it told, since what a recipe says enters fingerprints.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from infra.data.fitting import Size
from infra.train.flops import SAMPLES, counting
from infra.train.task import Batch, Task, Update
from t2i.clip.task import ClipTask
from t2i.clip.words import CLIPWords, train_words
from t2i.conditions.labels import LabelConfig
from t2i.conditions.layout import LayoutConfig
from t2i.conditions.text_features import TextFeaturesConfig
from t2i.conditions.words import WordsConfig
from t2i.priors.asking import CAPTION, PICTURE
from t2i.priors.task import ConditionKind, PriorShape, PriorTask, save_vocabulary
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.task import TokenizerTask, build_tokenizer
from t2i.vocabulary import TextVocabulary
from workflows.train_clip import TrainClipConfig
from workflows.train_prior import TrainPriorConfig
from workflows.train_tokenizer import TrainTokenizerConfig

FEW = 2  # rows that are computed; of rows that see each other twice as many, too
STYLE = "given"

Trains = TrainTokenizerConfig | TrainPriorConfig | TrainClipConfig


@dataclass(frozen=True)
class Forecast:
    """FLOPs of a training: of a row, by the training step from which on it costs so much."""

    by_row: Mapping[int, float]
    batch: int

    def of(self, steps: int) -> float:
        """What so many steps cost."""
        ends = [*sorted(self.by_row)[1:], steps]
        each = zip(sorted(self.by_row), ends, strict=True)
        return self.batch * sum(self.by_row[start] * max(0, min(end, steps) - start) for start, end in each)

    def steps(self, flops: float) -> int:
        """The steps whose sum comes closest."""
        for start in sorted(self.by_row, reverse=True):
            if (left := flops - self.of(start)) > 0 or not start:
                return max(1, start + round(left / (self.batch * self.by_row[start])))
        raise AssertionError("the first step is 0")


def steps_for(config: Trains, flops: float, **given: Any) -> int:
    """The steps of a training that costs `flops`, as its summary will tell them (`training_flops`), within 3 %.

    `given` is what `forecast` takes: `steps_for(prior, 20e12, size=(32, 32), tokenizer=tokenizer, captions=texts)`.
    """
    return forecast(config, **given).steps(flops)


def forecast(
    config: Trains,
    *,
    size: Size | Sequence[Size] = (),
    tokenizer: TrainTokenizerConfig | None = None,
    captions: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
) -> Forecast:
    """Count what a row costs.

    `size` (height, width) is that of the corpus's pictures, or all sizes of its buckets, which then come equally often.
    A prior needs the config of its `tokenizer`. Where captions are read, `captions` are some of those that are trained
    on: of them a vocabulary is learned, and their lengths count; some hundreds do. `columns` has, by name, a row's
    value of what a prior's conditions read beside pictures, captions, labels and boxes. ValueError for what lacks.

    The model is built and computes two rows, or four, on the CPU: it has to fit there.
    """
    sizes: Sequence[Any] = [size] if size and isinstance(size[0], int) else size  # type: ignore[list-item]
    train = config.train
    if train is None:
        raise ValueError("A tokenizer of pixels learns nothing, and costs nothing.")
    with ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory())
        if isinstance(config, TrainPriorConfig):
            task, rows = _prior(config, sizes, tokenizer, captions, folder)
        elif isinstance(config, TrainClipConfig):
            side = config.model.image_size
            task, rows = _clip(config, captions, folder), {"pixels": np.zeros((side, side, 3), np.uint8)}
        else:
            task = TokenizerTask(
                model=config.model,
                losses=config.losses,
                optim=config.optim,
                critic=config.critic,
                critic_optim=config.critic_optim,
                seed=config.seed,
            )
            rows = {"pixels": None}
        return Forecast(_counted(task, rows | dict(columns or {}), sizes, captions, train.batch), train.batch)


def _prior(
    config: TrainPriorConfig,
    sizes: Sequence[Size],
    tokenizer: TrainTokenizerConfig | None,
    captions: Sequence[str],
    folder: str,
) -> tuple[PriorTask, dict[str, Any]]:
    if tokenizer is None or not sizes:
        raise ValueError("A prior draws values of a tokenizer: give the tokenizer's config, and the size of pictures.")
    with torch.device("meta"):
        model = build_tokenizer(tokenizer.model)
    pixels = isinstance(tokenizer.model, PixelsConfig)
    space = model.space(tokenizer.model.size if isinstance(tokenizer.model, PixelsConfig) else sizes[0])
    told = tuple(_resolved(each, captions, folder) for each in config.told)
    words = any(isinstance(each, WordsConfig) for each in told)
    task = PriorTask(
        shape=PriorShape(model=config.model, space=space, conditions=told),
        folder=folder if words else "",
        styles=(STYLE,),
        optim=config.optim,
        text_weight=config.text_weight,
        seed=config.seed,
        column=PICTURE if pixels else "codes",
    )
    values = np.zeros(space.shape, np.int64 if space.codes else np.float32)
    rows: dict[str, Any] = {PICTURE: None} if pixels else {task.column: values.reshape(-1)}
    for each in told:
        if isinstance(each, LabelConfig):
            rows[each.column] = ""
    return task, rows


def _resolved(condition: ConditionKind, captions: Sequence[str], folder: str) -> ConditionKind:
    """As `train_prior` resolves them by the rows of a mixture."""
    if CAPTION in condition.reads and not captions:
        raise ValueError(f"The condition '{condition.name}' hears captions, whose lengths count: give some.")
    if isinstance(condition, WordsConfig):
        words = TextVocabulary.train(captions, condition.vocabulary_size, condition.length)
        save_vocabulary(words, folder)
        return replace(condition, vocabulary_size=len(words))
    if isinstance(condition, LabelConfig):
        return condition if condition.labels else replace(condition, labels=("a",))
    if isinstance(condition, LayoutConfig):
        return condition if condition.classes else replace(condition, classes=("a",))
    return condition.resolved() if isinstance(condition, TextFeaturesConfig) else condition


def _clip(config: TrainClipConfig, captions: Sequence[str], folder: str) -> ClipTask:
    if not captions:
        raise ValueError("CLIP reads captions, whose lengths count: give some.")
    train_words(captions, config.model.vocabulary_size, config.model.length, folder)
    model = replace(config.model, vocabulary_size=len(CLIPWords(folder, config.model.length)))
    return ClipTask(model=model, words=folder, styles=(STYLE,), optim=config.optim, seed=config.seed)


def _counted(
    task: Task, row: Mapping[str, Any], sizes: Sequence[Size], captions: Sequence[str], batch: int
) -> dict[int, float]:
    """FLOPs of a row by the step from which on it costs so much, the mean over some batches as they will come."""
    updates = task.updates()
    batches = [_batch(task, row, sizes[n % len(sizes)] if sizes else None, captions, batch, n) for n in range(SAMPLES)]
    shapes = [tuple((name, column.shape) for name, column in sorted(each.items())) for each in batches]
    of_shape = dict(zip(shapes, batches, strict=True))
    by_row: dict[int, float] = {}
    starts = {each.start_step for each in (*updates, *getattr(task, "critics", ()))}
    for start in sorted({0} | starts):
        awake = [update for update in updates if update.start_step <= start]
        costs = {shape: sum(_row(update, each, start, batch) for update in awake) for shape, each in of_shape.items()}
        by_row[start] = sum(costs[shape] for shape in shapes) / len(shapes)
    return by_row


def _batch(
    task: Task, row: Mapping[str, Any], size: Size | None, captions: Sequence[str], rows: int, number: int
) -> Batch:
    """Rows of a training step, as the feed gives them; of equal columns, but for their captions, which are drawn."""
    draws, rows = np.random.default_rng(number), max(rows, 2 * FEW)
    columns: dict[str, list[Any]] = {}
    for name in task.reads:
        plain = name.removesuffix("?")
        if name in row or plain in row:
            value = row.get(name, row.get(plain))
            if value is None:
                if size is None:
                    raise ValueError("A row's pixels count: give the size of the pictures.")
                value = np.zeros((*size, 3), np.uint8)
            columns[name] = [value] * rows
        elif name == f"caption_{STYLE}":
            columns[name] = [captions[place] for place in draws.integers(len(captions), size=rows)]
        elif name == f"weight_{STYLE}":
            columns[name] = [1.0] * rows
        elif plain == PICTURE and size is not None:
            columns[name] = [np.zeros((*size, 3), np.uint8)] * rows
        elif plain in ("boxes", "box_classes"):
            columns[name] = [[]] * rows
        elif name.endswith("?"):
            columns[name] = [None] * rows
        else:
            raise ValueError(f"The column '{name}' is read: give a value of it, as columns={{'{name}': ...}}.")
    arrays = task.collate(columns, lambda salt: draws.random(rows))
    made = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return made | {"weight": torch.ones(rows), "id": torch.arange(rows)}


def _row(update: Update, batch: Batch, step: int, rows: int) -> float:
    """FLOPs of an Update by the row, in a batch of so many rows.

    Where rows see each other, a row costs more the more there are, by as much for each: so few of them tell it.
    """
    few = _computed(update, batch, step, FEW) / FEW
    if not update.mixes_rows:
        return few
    return few + (_computed(update, batch, step, 2 * FEW) / (2 * FEW) - few) / FEW * (rows - FEW)


def _computed(update: Update, batch: Batch, step: int, rows: int) -> float:
    some = {name: column[:rows] for name, column in batch.items()} | {"step": torch.tensor(step)}
    module = update.module.train()
    with counting() as count:
        given = module(some)
        losses = [given[name] for name in module.targets(some)]  # type: ignore[operator]
        torch.stack([loss.float() for loss in losses]).sum().backward()
    module.zero_grad(set_to_none=True)
    return count.flops
