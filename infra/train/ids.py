"""Which rows each training step used, written down while it trains, and the proof that it was each once an epoch."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from infra import storage
from infra.data.ahead import ahead
from infra.data.shards import ShardReader, select_rows
from infra.train import world
from infra.train.draw import numeric_ids
from infra.train.plan import BatchPlan
from infra.train.task import Batch, Task

_NAME = re.compile(r"(\d{6})-(\d{5})-of-(\d{5})\.jsonl")


class IdLog:
    """One worker's file of the rows that it trained on: a line a training step, appended in one piece.

    A process that is killed leaves at most its last line torn, and that line is read over; a power cut may take more.
    A log is made where training starts or starts again, by all workers together, for they agree on the number of the
    attempt. Raises ValueError where `folder` cannot be appended to, as on S3.
    """

    def __init__(self, folder: str, start: int) -> None:
        """`start` is the first training step of this attempt: what earlier ones wrote of it and later ones is void."""
        if not storage.is_local(folder):
            raise ValueError(f"Ids are logged by appending, which {folder} cannot. Give a folder that workers share.")
        folder = storage.absolute(folder)
        os.makedirs(folder, exist_ok=True)
        found = [int(match[1]) for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]
        attempt = world.from_first(max(found, default=-1) + 1)
        name = f"{attempt:06d}-{world.rank():05d}-of-{world.size():05d}.jsonl"
        self._file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        self._write({"start": start})

    def __call__(self, step: int, micro_batches: Iterable[Batch]) -> None:
        """Write the ids of a step's rows; padding is left out."""
        ids = [i for batch in micro_batches for i in batch["id"][batch["weight"] > 0].tolist()]
        self._write({"step": step, "ids": ids})

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise OSError("A line of the id log could not be written whole. Is the disk full?")


def read_ids(folder: str) -> dict[int, list[int]]:
    """The ids that each training step used, in the order of the global batch, by step.

    An attempt makes void what those before it wrote from its first step on. The steps that count are those that all
    workers of their attempt wrote. ValueError where such a step is missing between others, or a file is missing or
    broken elsewhere than at its end.
    """
    steps: dict[int, list[int]] = {}
    for attempt, files in groupby(_files(folder), key=lambda file: file[0]):
        parts = [(world_size, *_read(path)) for _, world_size, path in files]
        starts = {start for _, start, _ in parts if start is not None}
        if not starts:
            continue  # all were killed before they began
        if len(starts) > 1:
            raise ValueError(f"The workers of attempt {attempt} began at different steps: {sorted(starts)}.")
        (start,) = starts
        steps = {step: ids for step, ids in steps.items() if step < start}
        if len(steps) < start:
            raise ValueError(f"Attempt {attempt} began at step {start}, and no file says what step {len(steps)} used.")
        if len(parts) == parts[0][0]:
            whole = set.intersection(*(set(lines) for _, _, lines in parts))
            if whole != set(range(start, start + len(whole))):
                raise ValueError(f"A step of attempt {attempt} between others was not written by all of its workers.")
            steps |= {step: [i for _, _, lines in parts for i in lines[step]] for step in sorted(whole)}
    return steps


def row_ids(inputs: Sequence[str], shards: Sequence[str], task: Task) -> list[np.ndarray]:
    """The ids of the rows of each shard that a task is trained on, (rows,) int64, as BatchPlan numbers them."""

    def read(shard: str) -> np.ndarray:
        reader = ShardReader(inputs, shard)
        usable = select_rows(reader, task.where, task.where_reads)
        return numeric_ids(reader.stored(["sample_id"], usable)["sample_id"]).view(np.int64)

    return list(ahead(read, shards, threads=8, depth=32))


def check(steps: dict[int, list[int]], plan: BatchPlan, ids: Sequence[np.ndarray]) -> int:
    """How many whole epochs `steps` cover, from step 0 on; ValueError where they are not what the plan says.

    `ids` are those of `row_ids`. Each step must have used the rows of the plan in its order, and each whole epoch
    every row once, which is counted apart from the plan.
    """
    if set(steps) != set(range(len(steps))):
        raise ValueError(f"Of {len(steps)} logged steps, the first that is missing is {_first_gap(steps)}.")
    used: list[int] = []
    for step in range(len(steps)):
        rows = plan.steps(step, step + 1)
        planned = [int(ids[shard][row]) for shard, row in zip(rows.shard, rows.row, strict=True)]
        if steps[step] != planned:
            raise ValueError(f"Step {step} used other rows than those planned: {_difference(planned, steps[step])}.")
        used += steps[step]
    every = sorted(np.concatenate(ids).tolist())
    whole = len(used) // len(every)
    for epoch in range(whole):
        if sorted(used[epoch * len(every) : (epoch + 1) * len(every)]) != every:
            raise ValueError(f"Epoch {epoch} did not use every row once.")
    return whole


def _first_gap(steps: dict[int, list[int]]) -> int:
    return next(step for step in range(len(steps) + 1) if step not in steps)


def _difference(planned: list[int], used: list[int]) -> str:
    missing, more = Counter(planned) - Counter(used), Counter(used) - Counter(planned)
    if not missing and not more:
        return "the same rows in another order"
    return f"{missing.total()} are missing, {more.total()} are there that should not be"


def _files(folder: str) -> list[tuple[int, int, Path]]:
    """Attempt, number of workers and path of each file, by attempt and rank."""
    paths = sorted(Path(storage.absolute(folder)).iterdir())
    return [(int(match[1]), int(match[3]), path) for path in paths if (match := _NAME.fullmatch(path.name))]


def _read(path: Path) -> tuple[int | None, dict[int, list[int]]]:
    """The first step of an attempt, None if the file ends before it says so, and what each step used."""
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last line's end is nothing, or a torn line
    try:
        records = [json.loads(line) for line in lines]
        start = records[0]["start"] if records else None
        return start, {record["step"]: record["ids"] for record in records[1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no id log: {type(error).__name__}: {error}.") from None
