"""Saves checkpoints while training goes on: one thread a worker writes, and rank 0's commits what all have written.

No collective runs in a thread: workers meet in the folder. Each puts a small record beside its part, rank 0 waits for
the records of this very save, writes the commit record last and then removes what is kept no longer.
"""

import hashlib
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch

from infra import storage
from infra.data.ahead import ahead
from infra.train import checkpoint, world
from infra.train.tensors import pieces

_POLL_SECONDS = (0.01, 1.0)  # between two looks for the parts of others: the first pause, and the longest


class Writer:
    """Saves the checkpoints of one training under `folder`; a collective, as are `save` and `close`.

    Kept are the newest `keep` and the one of the lowest score. With `background`, `save` returns at once and one save
    at a time is under way: memory is one share of the state. What goes wrong in it is raised by the next `check`,
    `wait`, `save` or `close`. A worker waits `limit_seconds` for the others' parts. As a context manager it is closed
    at the end; after an error it is left as it is, without waiting.

    Nobody else may write into `folder`: what lies there and was never committed is removed at the start.
    """

    def __init__(self, folder: str, keep: int = 2, background: bool = True, limit_seconds: float = 600) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, but it is {keep}: training could not go on after a fault.")
        self._folder, self._keep, self._background, self._limit = folder, keep, background, limit_seconds
        self._rank, self._size = world.rank(), world.size()
        if self._rank == 0:
            _clear(folder)
        # In the names of all that this training writes: no part of an earlier one is ever taken for one of its own.
        self._token = world.from_first(uuid.uuid4().hex[:12])
        self._saves, self._step = 0, -1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._left = threading.Event()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._left.set()

    def save(self, step: int, state: dict[str, torch.Tensor], meta: dict[str, Any], score: float | None = None) -> None:
        """Save `state` (this worker's share) as the checkpoint after `step` steps, once the save before it has ended.

        The tensors are the writer's from now on: one that changes before the save has ended makes it an error.
        `meta` and `score` (lower is better, as a mean loss) are rank 0's. A step just saved is not saved again.
        """
        self.wait()
        if step == self._step:
            return
        self._saves, self._step = self._saves + 1, step
        score = float(score) if score is not None and math.isfinite(score) else None
        # Torch counts the changes of a tensor, with those of all views of it.
        held = [(name, tensor, tensor._version) for name, tensor in state.items()]
        arguments = (step, f"{self._token}-{self._saves}", held, meta, score)
        if not self._background:
            self._run(*arguments)
            self.check()
            return
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in a save, once; it costs nothing, so that every step may ask."""
        if self._error is not None:
            error, self._error, self._step = self._error, None, -1
            raise error

    def wait(self) -> None:
        """Wait until this worker's part of the save under way is written (on rank 0: until it is committed)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Wait until the last save counts; RuntimeError where another worker could not save its part."""
        error = None
        try:
            self.wait()
        except Exception as failure:
            error = failure
        told = world.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(told):
            if text is not None:
                raise RuntimeError(_blame(rank, text))

    def _run(self, *arguments: Any) -> None:
        try:
            self._save(*arguments)
        except BaseException as error:
            self._error = error

    def _save(self, step: int, token: str, held: list[Any], meta: dict[str, Any], score: float | None) -> None:
        target = checkpoint.place(self._folder, step)
        names = [f"part-{rank:05d}-of-{self._size:05d}-{token}.safetensors" for rank in range(self._size)]
        mine = names[self._rank]
        try:
            written = _Hash(pieces({name: tensor for name, tensor, _ in held}))
            storage.write_pieces(storage.join(target, mine), written)
            if changed := [name for name, tensor, version in held if tensor._version != version]:
                raise RuntimeError(f"'{changed[0]}' changed while step {step} was saved. Give the Writer copies.")
        except Exception as error:
            with suppress(OSError):  # rank 0 need not wait for what will never come, if it can be told
                storage.write_json(storage.join(target, _record(mine)), {"error": str(error)})
            raise
        held.clear()  # what waits below for other workers needs none of it
        storage.write_json(storage.join(target, _record(mine)), {"name": mine, **written.told()})
        if self._rank == 0 and (parts := self._gather(target, names)):
            checkpoint.write_commit(target, {**meta, "step": step, "score": score, "parts": parts})
            _trim(self._folder, step, self._keep)

    def _gather(self, target: str, names: list[str]) -> list[dict[str, Any]]:
        """The records of all parts, when the last of them is there; none if the training has ended meanwhile."""
        found: dict[str, dict[str, Any]] = {}
        deadline, (pause, longest) = time.monotonic() + self._limit, _POLL_SECONDS
        while True:
            here = set(storage.list_names(target))
            come = [name for name in names if name not in found and _record(name) in here]
            records = _at_once(storage.read_json, [storage.join(target, _record(name)) for name in come])
            for name, record in zip(come, records, strict=True):
                if "error" in record:
                    raise RuntimeError(_blame(names.index(name), record["error"]))
                found[name] = record
            if len(found) == len(names):
                return [found[name] for name in names]
            if time.monotonic() > deadline:
                missing = [rank for rank, name in enumerate(names) if name not in found]
                raise TimeoutError(
                    f"The checkpoint {target} cannot be committed: {self._limit:g} s after worker 0 had written its "
                    f"part, nothing had come of worker {', '.join(map(str, missing))}. See why it is slow, or ended."
                )
            if self._left.wait(pause):
                return []
            pause = min(2 * pause, longest)


class _Hash:
    """Passes pieces on, and knows their size and hash afterwards."""

    def __init__(self, data: Iterable[bytes | memoryview]) -> None:
        self._data, self._size, self._sha256 = data, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for piece in self._data:
            self._size += len(piece)
            self._sha256.update(piece)
            yield piece

    def told(self) -> dict[str, Any]:
        return {"size": self._size, "sha256": self._sha256.hexdigest()}


def _record(part: str) -> str:
    return f"{part}.json"


def _blame(rank: int, text: str) -> str:
    return f"Worker {rank} could not save its part of a checkpoint: {text}"


def _clear(folder: str) -> None:
    """Remove what earlier trainings left without committing it; who trains next in `folder` is alone there."""
    for step in checkpoint.steps(folder):
        url = checkpoint.place(folder, step)
        if checkpoint.read_commit(url) is None:
            storage.remove(url)
        else:
            _tidy(url)
    storage.sweep(folder)


def _trim(folder: str, step: int, keep: int) -> None:
    """Remove what is older than the checkpoint just committed and neither among the newest `keep` nor the best."""
    _tidy(checkpoint.place(folder, step))
    # Nothing newer is looked at: another worker may be writing its part of the next one.
    older = [each for each in checkpoint.steps(folder) if each <= step]
    records = {each: record for each in older if (record := checkpoint.read_commit(checkpoint.place(folder, each)))}
    scores = [(record["score"], -each) for each, record in records.items() if record["score"] is not None]
    kept = {*list(records)[:keep], *(-each for _, each in sorted(scores)[:1])}
    for each in older:
        if each not in kept:
            url = checkpoint.place(folder, each)
            storage.remove(storage.join(url, checkpoint.COMMIT))  # first: a removal that is cut leaves no checkpoint
            storage.remove(url)


def _tidy(url: str) -> None:
    """Remove from a committed checkpoint what is none of its parts."""
    record = checkpoint.read_commit(url)
    assert record is not None
    rest = {*storage.list_names(url)} - {checkpoint.COMMIT, *(part["name"] for part in record["parts"])}
    deque(_at_once(storage.remove, [storage.join(url, name) for name in rest]), maxlen=0)


def _at_once(function: Callable[[str], Any], urls: list[str]) -> Iterator[Any]:
    """What a function of each address gives, in order: a request to S3 takes long, but many may be under way."""
    return ahead(function, urls, threads=storage.AT_ONCE, depth=2 * storage.AT_ONCE)
