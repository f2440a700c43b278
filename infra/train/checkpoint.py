"""Checkpoints that know no world size: each worker writes its share of the full state, a commit record comes last.

A checkpoint is a folder `<step>` of parts and of `commit.json`, which names the parts with sizes and hashes and carries
a hash of itself. What has no such record does not exist for any reader: it is the rest of a save that was cut.
"""

import hashlib
import json
import re
from typing import Any

import torch

from infra import storage, strict
from infra.train import world
from infra.train.tensors import TensorFile

COMMIT = "commit.json"


class Checkpoint:
    """The tensors of a committed checkpoint by name, each read from where it lies when it is asked for.

    ValueError where no commit record is, or where a part is not what it says in the parts that are read at once. Who
    wants every byte checked takes the address from `newest`, `best` or `restore`.
    """

    def __init__(self, url: str) -> None:
        record = read_commit(url)
        if record is None:
            raise ValueError(f"{url} is no checkpoint: it has no {COMMIT} that is whole. Take the one before it.")
        self.url, self.meta = url, record
        self.step: int = record["step"]
        self._parts: dict[str, TensorFile] = {}
        for part in record["parts"]:
            opened = TensorFile(storage.join(url, part["name"]))
            self._parts |= dict.fromkeys(opened.names, opened)

    @property
    def names(self) -> list[str]:
        """All that it holds."""
        return list(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            raise ValueError(f"The checkpoint of step {self.step} has no '{name}'; it was written by another model.")
        return self._parts[name][name]


def restore(folder: str) -> Checkpoint | None:
    """The newest checkpoint under `folder` that is whole, for every worker, or None; a collective.

    Every byte is read once and hashed, by one worker or another: of n parts each of w workers reads n / w.
    """
    for url in world.from_first(_complete(folder) if world.rank() == 0 else None):
        if all(world.gather(_is_sound(url, world.rank(), world.size()))):
            return Checkpoint(url)
    return None


def newest(folder: str) -> str | None:
    """The newest checkpoint under `folder` that is whole, or None; this process alone reads every byte of it."""
    return next((url for url in _complete(folder) if _is_sound(url)), None)


def best(folder: str) -> str | None:
    """The whole checkpoint of the lowest score, of equals the newest, or None where none was saved with a score."""
    scored = [(record["score"], url) for url in _complete(folder) if (record := read_commit(url))]
    ranked = sorted([pair for pair in scored if pair[0] is not None], key=lambda pair: pair[0])
    return next((url for _, url in ranked if _is_sound(url)), None)


def reached(folder: str) -> int:
    """The step of the newest checkpoint whose parts are all there in their sizes; 0 where there is none."""
    return next((step for step in steps(folder) if _has_all(place(folder, step))), 0)


def step_of(url: str) -> int:
    """How many training steps led to the checkpoint at `url`."""
    return int(storage.name(url))


def place(folder: str, step: int) -> str:
    """Where the checkpoint after `step` training steps lies."""
    return storage.join(folder, f"{step:09d}")


def steps(folder: str) -> list[int]:
    """Steps that have a folder, committed or not, newest first."""
    return sorted((int(name) for name in storage.list_names(folder) if re.fullmatch(r"\d{9}", name)), reverse=True)


def write_commit(url: str, record: dict[str, Any]) -> None:
    """Commit a checkpoint whose parts are all there; a record holds `step`, `score` and `parts`, and what you like."""
    storage.write_json(storage.join(url, COMMIT), record | {"sha256": _seal(record)})


def read_commit(url: str) -> dict[str, Any] | None:
    """What was committed at `url`; None where nothing was, or where the record is not what was written."""
    try:
        record = storage.read_json(storage.join(url, COMMIT))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.pop("sha256", None) != _seal(record):
        return None
    return record


def _seal(record: dict[str, Any]) -> str:
    """A hash of a record as it will be read again, however its keys are ordered."""
    plain = json.loads(strict.dumps(record))
    return hashlib.sha256(strict.dumps(plain, sort_keys=True).encode()).hexdigest()


def _complete(folder: str) -> list[str]:
    """Committed checkpoints whose parts are all there in their sizes, newest first; no part is read for it."""
    return [url for step in steps(folder) if _has_all(url := place(folder, step))]


def _has_all(url: str) -> bool:
    if (record := read_commit(url)) is None:
        return False
    try:
        sizes = {storage.name(file.url): file.size for file in storage.listing(url)}
    except FileNotFoundError:
        return False  # removed since
    return all(sizes.get(part["name"]) == part["size"] for part in record["parts"])


def _is_sound(url: str, first: int = 0, every: int = 1) -> bool:
    """Whether the bytes of the parts `first`, `first + every`, ... are those that were written."""
    record = read_commit(url)
    try:
        return record is not None and all(
            storage.digest(storage.join(url, part["name"])) == {"size": part["size"], "sha256": part["sha256"]}
            for part in record["parts"][first::every]
        )
    except FileNotFoundError:
        return False
