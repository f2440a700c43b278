"""The losses of a checkpoint on rows that are held out, and the pictures that it draws for the first of them."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from infra import storage
from infra.data.first import first_rows
from infra.data.images import encode_png
from infra.data.shards import ShardReader, Where, select_rows
from infra.metrics import HELD_OUT, PICTURES, PROMPTS, ScalarLog, read_scalars
from infra.train import checkpoint
from infra.train.engine import load_weights
from infra.train.loop import is_loss
from infra.train.prepare import Chunk, Prepare
from infra.train.task import Batch, Draw, Painter, Task, Update
from infra.train.turn import acquainted
from infra.train.worker import Training

SPLIT, TRAIN, TEST = "split", "train", "test"  # a column, and its values where a row is trained on, and held out
COST = "held_out_cpu_seconds"
ROWS_AT_ONCE = 16
TITLE = 80  # characters of a prompt over a picture in TensorBoard
MEMORY_SHARE = 0.5  # of what is free, that a checkpoint may take


class NoRoomError(RuntimeError):
    """A checkpoint is too large for the memory of the machine that would look at it."""


def has_held_out(task: Task) -> bool:
    """Whether a task chooses its rows by the split, so that there may be others like them."""
    return SPLIT in task.where_reads


def folder_of(training: Training) -> str:
    """Where all that is seen of it is written."""
    return storage.join(training.out, HELD_OUT)


def last_step(training: Training) -> int:
    """The last training step whose held-out losses are written; 0 where there is none."""
    return max((row["step"] for row in read_scalars(folder_of(training))), default=0)


def summary(trainings: Sequence[Training]) -> dict[str, float]:
    """The last held-out losses, by name, and the CPU-seconds that all of them took; nothing where none was seen."""
    seen = [rows for training in trainings if (rows := read_scalars(folder_of(training)))]
    if not seen:
        return {}
    last = {name: value for rows in seen for name, value in rows[-1].items() if is_loss(name)}
    return {**last, "cpu_seconds": round(sum(row[COST] for rows in seen for row in rows), 1)}


class Seen:
    """A training as it is seen from outside, checkpoint by checkpoint; written to `<out>/held_out`.

    The first Update is measured, the learner's own: what a critic thinks of pictures that it never saw is not. Its
    module is in evaluation mode, in fp32, with the averaged weights where such are kept, whatever precision is trained
    in. Rows that see each other (`Update.mixes_rows`) see as many as in training, at most all that are held out.
    """

    def __init__(self, training: Training, count: int) -> None:
        self.training, self.rows = training, HeldOut(training, count)
        self._updates: list[Update] = []
        self._log: ScalarLog | None = None

    def look(self, step: int, since: float) -> None:
        """Measure the checkpoint after so many steps, and draw pictures, where the task does.

        `since` is the time of this process (`time.process_time`) from which on its seconds are counted as the cost.
        FileNotFoundError where the checkpoint is gone, NoRoomError where it is too large.
        """
        self._load(step)
        (update, *_), size = self._updates, self.training.config.batch
        figures = losses(update, self.rows.batches(size if update.mixes_rows else ROWS_AT_ONCE), step)
        drawn = self._drawn(step)
        if self._log is None:
            self._log = ScalarLog(folder_of(self.training), last_step(self.training), gauges=f"{HELD_OUT}/")
        self._log.show(step, drawn)
        self._log(step, {**figures, COST: time.process_time() - since})  # last: what is written is not looked at again
        self._log.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._log is not None:
            self._log.close()

    def _load(self, step: int) -> None:
        url = checkpoint.place(self.training.checkpoints, step)
        if (record := checkpoint.read_commit(url)) is None:
            raise FileNotFoundError(f"There is no checkpoint at {url} any more.")
        size, free = sum(part["size"] for part in record["parts"]), psutil.virtual_memory().available
        if size > MEMORY_SHARE * free:
            raise NoRoomError(f"A checkpoint of {size / 1e9:.1f} GB is too large where {free / 1e9:.1f} GB are free.")
        saved = checkpoint.Checkpoint(url)
        self._updates = self._updates or self.training.task.updates()
        for update in self._updates:
            load_weights(update, saved, "ema")
            update.module.eval()

    def _drawn(self, step: int) -> dict[str, np.ndarray]:
        """Pictures (H, W, 3) by what they were to show; a PNG of them all is written."""
        task, folder = self.training.task, folder_of(self.training)
        if not isinstance(task, Painter) or not task.paints:
            return {}
        batch, prompts = self.rows.asked(task, task.paints)
        with torch.no_grad():
            pictures = task.paint({update.name: update.module for update in self._updates}, batch)
        storage.write_json(storage.join(folder, PROMPTS), prompts)
        strip = encode_png(np.concatenate(list(pictures), axis=1))
        storage.write_bytes(storage.join(folder, PICTURES, f"{step:09d}.png"), strip)
        return {f"{row} {text}"[:TITLE]: one for row, (text, one) in enumerate(zip(prompts, pictures, strict=True), 1)}


class _Row(NamedTuple):
    sample_id: str
    shard: str
    place: int  # among the usable rows of the shard
    bucket: str


class HeldOut:
    """The first rows by sample id that a training would use if they were not held out, prepared as in epoch 0."""

    def __init__(self, training: Training, count: int) -> None:
        self._training, self._key = training, uuid.uuid4().hex
        task = training.task
        self._like = _Like(task, _held_out(task.where), task.collate)
        found = first_rows(training.inputs[0], SPLIT, TEST, count, self._read, lambda row: row.sample_id)
        self._rows = sorted(found, key=lambda row: (row.bucket, row.sample_id))

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int) -> Iterator[list[Batch]]:
        """The rows as global batches of a size, each in micro-batches; the last of a bucket may be smaller."""
        for _, same in groupby(self._rows, key=lambda row: row.bucket):
            rows = list(same)
            for first in range(0, len(rows), size):
                yield list(self._prepared(rows[first : first + size]))

    def asked(self, painter: Painter, count: int) -> tuple[Batch, list[str]]:
        """What pictures of the first rows are drawn of, and what they are to show, in words."""
        rows = [row for row in self._rows if row.bucket == self._rows[0].bucket][:count]
        (arrays,) = self._arrays(_Like(self._training.task, self._like.where, painter.asks), rows, len(rows))
        prompts = [str(text) for text in arrays.pop("prompt")]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, prompts

    def _read(self, shard: str) -> Iterator[_Row]:
        reader, bucket = ShardReader(self._training.inputs, shard), self._like.bucket
        usable = select_rows(reader, self._like.where, self._like.where_reads, bucket)
        found = reader.stored(["sample_id", *([bucket] if bucket else [])], usable)
        values = found[bucket] if bucket else [""] * len(usable)
        for place, (sample_id, value) in enumerate(zip(found["sample_id"], values, strict=True)):
            yield _Row(sample_id, shard, place, value)

    def _prepared(self, rows: Sequence[_Row]) -> Iterator[Batch]:
        for arrays in self._arrays(self._like, rows, min(ROWS_AT_ONCE, len(rows))):
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _arrays(self, like: "_Like", rows: Sequence[_Row], size: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches of `size` rows, the last filled up with rows of weight 0."""
        filled = [*rows, *[rows[-1]] * (-len(rows) % size)]
        shards = sorted({row.shard for row in rows})
        chunk = Chunk(
            shards,
            shard=np.array([shards.index(row.shard) for row in filled]),
            row=np.array([row.place for row in filled]),
            epoch=np.zeros(len(filled), np.int64),
            weight=(np.arange(len(filled)) < len(rows)).astype(np.float32),
        )
        task: Any = like
        inputs, seed = self._training.inputs, self._training.config.seed
        return Prepare(task, inputs, seed, size, retries=0, key=self._key).batches(chunk)


class _Like:
    """Taken for a Task by what prepares rows: it reads what another does, and has other rows, or other arrays."""

    def __init__(self, task: Task, where: Where, collate: Callable[[dict[str, list], Draw], dict[str, np.ndarray]]):
        self.reads, self.where_reads, self.bucket, self.picks = task.reads, task.where_reads, task.bucket, task.picks
        self.where, self.collate = where, collate


def _held_out(where: Where) -> Where:
    """The rows that `where` would choose if those that are held out were trained on, and the others were not."""
    return lambda columns: where({**columns, SPLIT: np.where(columns[SPLIT] == TEST, TRAIN, "")})


@torch.no_grad()
def losses(update: Update, batches: Iterable[list[Batch]], step: int) -> dict[str, float]:
    """The mean of each loss over its targets, by the names under which training logs it after `step` steps.

    `batches` are global batches in micro-batches.
    """
    module: Any = update.module
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for micro_batches in batches:
        for batch in micro_batches:
            batch["step"] = torch.tensor(step - 1)  # the last that was made
            for name, count in module.targets(batch).items():
                counts[name] = counts.get(name, 0.0) + float(count)
        if update.mixes_rows and len(micro_batches) > 1:
            micro_batches = acquainted(module, micro_batches)
        for batch in micro_batches:
            given = module(batch)
            for name in counts:
                sums[name] = sums.get(name, 0.0) + float(given[name])
    return {f"{update.name}/{name}": sums[name] / max(1.0, counts[name]) for name in counts}
