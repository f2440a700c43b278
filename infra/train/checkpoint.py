"""Checkpoints that know no world size: each worker writes its share of the full state, a commit record comes last."""

import hashlib
import re
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from infra import storage
from infra.train import world

COMMIT = "commit.json"  # its presence, with the sizes and hashes in it, means that the checkpoint is whole


def write(folder: str, step: int, state: dict[str, torch.Tensor], meta: dict[str, Any], keep: int = 2) -> None:
    """Save `state` (this worker's share) and `meta` as the checkpoint after `step` training steps; a collective."""
    target = storage.join(folder, f"{step:09d}")
    name = f"part-{world.rank():05d}-of-{world.size():05d}.safetensors"
    data = save(state)
    storage.write_bytes(storage.join(target, name), data)
    parts = world.gather({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    if world.rank() == 0:
        storage.write_json(storage.join(target, COMMIT), {"step": step, "parts": parts, **meta})
        for old in _steps(folder)[keep:]:
            storage.remove(storage.join(folder, f"{old:09d}"))
    world.gather(None)  # no worker goes on before the checkpoint counts


def newest(folder: str) -> str | None:
    """The newest checkpoint under `folder` that is whole, or None; a torn one is passed over for the one before it."""
    for step in _steps(folder):
        candidate = storage.join(folder, f"{step:09d}")
        if _is_whole(candidate):
            return candidate
    return None


def reached(folder: str) -> int:
    """The step of the newest checkpoint that was committed, whole or not; 0 where there is none."""
    steps = (step for step in _steps(folder) if storage.exists(storage.join(folder, f"{step:09d}", COMMIT)))
    return next(steps, 0)


def step_of(url: str) -> int:
    """How many training steps led to the checkpoint at `url`."""
    return int(storage.name(url))


class Checkpoint:
    """The tensors of a committed checkpoint by name, read on demand."""

    def __init__(self, url: str) -> None:
        local = storage.fetch(url)
        self.meta = storage.read_json(storage.join(local, COMMIT))
        self.step: int = self.meta["step"]
        self._parts = {}
        for part in self.meta["parts"]:
            opened = safe_open(storage.join(local, part["name"]), "pt")
            self._parts |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> list[str]:
        """All that it holds."""
        return list(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            raise ValueError(f"The checkpoint of step {self.step} has no '{name}'; it was written by another model.")
        return self._parts[name].get_tensor(name)


def _steps(folder: str) -> list[int]:
    """Steps that have a folder, newest first."""
    return sorted((int(name) for name in storage.list_names(folder) if re.fullmatch(r"\d{9}", name)), reverse=True)


def _is_whole(url: str) -> bool:
    try:
        for part in storage.read_json(storage.join(url, COMMIT))["parts"]:
            data = storage.read_bytes(storage.join(url, part["name"]))
            if len(data) != part["size"] or hashlib.sha256(data).hexdigest() != part["sha256"]:
                return False
    except (FileNotFoundError, ValueError, KeyError):
        return False
    return True
