"""Randomness as a function of (seed, epoch, id): the same on every machine and in any order."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, epochs: np.ndarray, ids: np.ndarray, salt: str) -> np.ndarray:
    """(B,) float64 in [0, 1), one for each pair of `epochs` (B,) and `ids` (B,) uint64."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{salt}".encode(), digest_size=8).digest(), "little")
    bits = _mix(_mix(_mix(np.uint64(key) + epochs.astype(np.uint64)) + ids.astype(np.uint64)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pick(several: Sequence[Any], uniforms: np.ndarray, weights: Sequence[Any] | None = None) -> list[int]:
    """For each row the place of one of its things, drawn by its `uniforms` (B,): 0 where it has one, or None.

    `weights` has as many numbers as a row has things, or None where all weigh the same.
    """
    places = []
    for row, (things, uniform) in enumerate(zip(several, uniforms.tolist(), strict=True)):
        own = None if weights is None else weights[row]
        own = np.ones(0 if things is None else len(things)) if own is None else np.asarray(own, np.float64)
        upper = own.cumsum()
        # Rounding may leave the last bound a hair too low, and nothing of weight 0 is drawn.
        last = int(np.flatnonzero(own)[-1]) if own.any() else 0
        places.append(min(int((upper <= uniform * upper[-1]).sum()), last) if own.any() else 0)
    return places


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """A permutation of range(size), int64; our own hash, since NumPy does not promise its streams across versions."""
    salt = "permutation/" + "/".join(str(part) for part in key)
    order = uniforms(seed, np.zeros(size), np.arange(size, dtype=np.uint64), salt)
    return np.argsort(order, kind="stable")


def numeric_ids(sample_ids: list[str]) -> np.ndarray:
    """The first 64 bits of hexadecimal sample ids, (B,) uint64."""
    return np.array([int(sample_id[:16], 16) for sample_id in sample_ids], dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), element by element."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, dtype=np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
