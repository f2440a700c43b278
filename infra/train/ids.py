"""Which rows each training step used, written down while it trains, and the proof that it was each once an epoch."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from infra import storage, strict
from infra.data.ahead import ahead
from infra.data.shards import ShardReader, select_rows
from infra.train import world
from infra.train.draw import numeric_ids
from infra.train.plan import Plan
from infra.train.task import Batch, Task

_ATTEMPT = re.compile(r"\d{6}(-|$)")
_NAME = re.compile(r"(\d{6})[-/](\d{5})-of-(\d{5})(?:-\d{6})?\.jsonl$")


class IdLog:
    """One worker's record of the rows that it trained on: a line a training step.

    On a disk it is a file to which each line is appended in one piece: a process that is killed leaves at most its last
    line torn, and that line is read over; a power cut may take more. In an object store, which cannot append, each
    `flush` puts the lines since the last one as an object: where all workers flush before they save, what each step of
    a checkpoint used is there. A log is made where training starts or starts again, by all workers together, for they
    agree on the number of the attempt.
    """

    def __init__(self, folder: str, start: int) -> None:
        """`start` is the first training step of this attempt: what earlier ones wrote of it and later ones is void."""
        folder = storage.absolute(folder)
        names = storage.list_names(folder) if world.rank() == 0 else []
        attempt = world.from_first(max((int(name[:6]) for name in names if _ATTEMPT.match(name)), default=-1) + 1)
        appends, mine = storage.is_local(folder), f"{world.rank():05d}-of-{world.size():05d}"
        self._name = storage.join(folder, f"{attempt:06d}{'-' if appends else '/'}{mine}")
        self._lines: list[bytes] = []
        self._objects, self._file = 0, -1
        if appends:
            os.makedirs(folder, exist_ok=True)
            self._file = os.open(f"{self._name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        self._write({"start": start})
        self.flush()

    def __call__(self, step: int, micro_batches: Iterable[Batch]) -> None:
        """Write the ids of a step's rows; padding is left out."""
        ids = [i for batch in micro_batches for i in batch["id"][batch["weight"] > 0].tolist()]
        self._write({"step": step, "ids": ids})

    def flush(self) -> None:
        """What was written is there for readers; to be called before each save."""
        if self._lines:
            url = f"{self._name}-{self._objects:06d}.jsonl"
            storage.write_bytes(url, b"".join(self._lines), overwrite=False)
            self._lines, self._objects = [], self._objects + 1

    def close(self) -> None:
        """Close the file; in an object store what was written since the last flush is left out."""
        if self._file >= 0:
            os.close(self._file)

    def _write(self, record: dict[str, Any]) -> None:
        line = (strict.dumps(record, separators=(",", ":")) + "\n").encode()
        if self._file < 0:
            self._lines.append(line)
        elif os.write(self._file, line) != len(line):
            raise OSError("A line of the id log could not be written whole. Is the disk full?")


def read_ids(folder: str) -> dict[int, list[int]]:
    """The ids that each training step used, in the order of the global batch, by step.

    An attempt makes void what those before it wrote from its first step on. The steps that count are those that all
    workers of their attempt wrote. ValueError where such a step is missing between others, or a file is missing or
    broken elsewhere than at its end.
    """
    steps: dict[int, list[int]] = {}
    for attempt, files in groupby(_files(folder), key=lambda file: file[0]):
        parts = list(_read(list(files)))
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
    """The ids of the rows of each shard that a task is trained on, (rows,) int64, as a Plan numbers them."""

    def read(shard: str) -> np.ndarray:
        reader = ShardReader(inputs, shard)
        usable = select_rows(reader, task.where, task.where_reads, task.bucket)
        return numeric_ids(reader.stored(["sample_id"], usable)["sample_id"]).view(np.int64)

    return list(ahead(read, shards, threads=8, depth=32))


def check(steps: dict[int, list[int]], plan: Plan, ids: Sequence[np.ndarray]) -> int:
    """How many whole epochs `steps` cover, from step 0 on; ValueError where they are not what the plan says.

    `ids` are those of `row_ids`. Each step must have used the rows of the plan in its order, and each whole epoch
    every row once, which is counted apart from the plan.
    """
    if set(steps) != set(range(len(steps))):
        raise ValueError(f"Of {len(steps)} logged steps, the first that is missing is {_first_gap(steps)}.")
    used: list[int] = []
    for step in range(len(steps)):
        rows = plan.steps(step, step + 1)
        rows = rows[rows.weight > 0]
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


def _files(folder: str) -> list[tuple[int, int, int, str]]:
    """Attempt, rank, number of workers and address of each file, in this order."""
    found = [(match, file.url) for file in storage.listing(folder) if (match := _NAME.search(file.url))]
    return sorted((int(match[1]), int(match[2]), int(match[3]), url) for match, url in found)


def _read(files: list[tuple[int, int, int, str]]) -> Iterator[tuple[int, int | None, dict[int, list[int]]]]:
    """Of each worker of an attempt: how many there were, its first step, and what each step used.

    The first step is None where it was killed before it said so.
    """
    contents = ahead(storage.read_bytes, [url for *_, url in files], storage.AT_ONCE, 2 * storage.AT_ONCE)
    for (_, _, size), mine in groupby(zip(files, contents, strict=True), key=lambda pair: pair[0][:3]):
        pairs = list(mine)
        # What follows the last line's end is nothing, or a torn line.
        *lines, _ = b"".join(data for _, data in pairs).split(b"\n")
        try:
            records = [json.loads(line) for line in lines]
            start = records[0]["start"] if records else None
            yield size, start, {record["step"]: record["ids"] for record in records[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{pairs[0][0][3]} is no id log: {type(error).__name__}: {error}.") from None
