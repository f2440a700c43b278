"""Random numbers that are functions of (key, salt, places), in torch: the same in any batch, order, cut and process.

    keys = keys_of([7, 8])                                      # (2,): one key a row
    noise = normals(keys, (4, 32, 32), "noise", step)           # (2, 4, 32, 32)
    second = child(keys, "link", 1)                             # (2,): keys of their own

A salt says what is drawn, places say where: numbers, or tensors (B,) with a number a row. Equal words, equal draws;
other words, unrelated ones. Bits, permutations and uniforms are equal on every device, normals to 1e-6; and number n of
a row does not depend on how many are drawn.

The words of a row are SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195) with a start of its own, of
which every word is a hash of its place: word n = mix(start + n * golden). Keys, salt and places are folded into the
start by the same hash. All of it is integer arithmetic modulo 2^64, which int64 does on every device.
Two rows' words overlap with probability 2N / 2^64, for N words a row.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import overload

import torch

Place = int | torch.Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_DRAWN = 0xD1B54A32D192ED03  # tells the words of a key from its children
_CACHED = 2**13  # words that the CPU works on at a time, for all of it to stay in its cache


def keys_of(seeds: Iterable[int], device: torch.device | str | None = None) -> torch.Tensor:
    """Keys (B,) int64 from whole numbers of any size, which count modulo 2^64."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)


def child(keys_B: torch.Tensor, salt: str, *places: Place) -> torch.Tensor:
    """Keys (B,) for what happens at `places` under the name `salt`, unrelated to `keys_B` and to one another."""
    if keys_B.dtype != torch.int64 or keys_B.dim() != 1:
        raise ValueError(f"Keys are int64 of shape (B,), but these are {keys_B.dtype} of {tuple(keys_B.shape)}.")
    told: Place = _signed(_hashed(salt))
    for place in places:
        told = _mixed(told + place)
    return _mixed(keys_B + told)


def bits(keys_B: torch.Tensor, count: int, salt: str, *places: Place) -> torch.Tensor:
    """(B, count) int64, of which all 64 bits are random."""
    start_B1 = _mixed(child(keys_B, salt, *places) ^ _signed(_DRAWN))[:, None]
    words_BN = torch.empty(len(keys_B), count, dtype=torch.int64, device=keys_B.device)
    rows, columns = _blocks(words_BN)
    for top in range(0, len(words_BN), rows):
        for left in range(0, count, columns):
            part = words_BN[top : top + rows, left : left + columns]
            place_N = torch.arange(left + 1, left + part.shape[1] + 1, device=keys_B.device)
            torch.add(start_B1[top : top + rows], place_N * _signed(_GOLDEN), out=part)
            _finish(part)
    return words_BN


def uniforms(
    keys_B: torch.Tensor, shape: Sequence[int], salt: str, *places: Place, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(B, *shape) in [0, 1), multiples of 2^-24 in float32 and of 2^-53 in float64."""
    digits = {torch.float32: 24, torch.float64: 53}
    if dtype not in digits:
        raise ValueError(f"Uniforms are float32 or float64, but {dtype} was asked for: others would round up to 1.")
    words_BN = bits(keys_B, math.prod(shape), salt, *places)
    numbers_BN = _right(words_BN, 64 - digits[dtype]).to(dtype).mul_(2.0 ** -digits[dtype])
    return numbers_BN.view(len(keys_B), *shape)


def normals(
    keys_B: torch.Tensor, shape: Sequence[int], salt: str, *places: Place, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(B, *shape) of N(0, 1), at most 6.7 in size; independent, two from each word.

    Box and Muller (1958, doi 10.1214/aoms/1177706645), worked out in float64, so that devices agree.
    """
    count = math.prod(shape)
    words_BN = bits(keys_B, -(-count // 2), salt, *places)
    normals_BN2 = torch.empty(*words_BN.shape, 2, dtype=dtype, device=keys_B.device)
    rows, columns = _blocks(words_BN)
    for top in range(0, len(words_BN), rows):
        for left in range(0, words_BN.shape[1], columns):
            part = (slice(top, top + rows), slice(left, left + columns))
            radius = (_right(words_BN[part], 32).double() + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
            angle = (words_BN[part] & 0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32)
            normals_BN2[part][..., 0] = radius * angle.cos()
            normals_BN2[part][..., 1] = radius.mul_(angle.sin_())
    return normals_BN2.flatten(1)[:, :count].reshape(len(keys_B), *shape)


def permutations(keys_B: torch.Tensor, size: int, salt: str, *places: Place) -> torch.Tensor:
    """(B, size) int64: a permutation of range(size) for each row."""
    return bits(keys_B, size, salt, *places).argsort(dim=1, stable=True)


def _blocks(words_BN: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a part that is worked on at a time."""
    if words_BN.device.type != "cpu":
        return max(1, len(words_BN)), max(1, words_BN.shape[1])
    columns = min(max(1, words_BN.shape[1]), _CACHED)
    return _CACHED // columns, columns


@overload
def _mixed(x: torch.Tensor) -> torch.Tensor: ...
@overload
def _mixed(x: int) -> int: ...
def _mixed(x: Place) -> Place:
    """SplitMix64's next word after state `x`, of a whole number or of each number of an int64 tensor."""
    if isinstance(x, torch.Tensor):
        return _finish(x + _signed(_GOLDEN))
    x = (x + _GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * _FIRST % 2**64
    x = (x ^ (x >> 27)) * _SECOND % 2**64
    return _signed(x ^ (x >> 31))


def _finish(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in place."""
    x.bitwise_xor_(_right(x, 30)).mul_(_signed(_FIRST))
    x.bitwise_xor_(_right(x, 27)).mul_(_signed(_SECOND))
    return x.bitwise_xor_(_right(x, 31))


def _right(x: torch.Tensor, places: int) -> torch.Tensor:
    """The bits of an int64 tensor moved to the right, with zeros behind them (`>>` alone repeats the sign)."""
    return (x >> places).bitwise_and_(2 ** (64 - places) - 1)


def _signed(x: int) -> int:
    """The int64 that has the last 64 bits of `x`."""
    return (x + 2**63) % 2**64 - 2**63


@cache
def _hashed(salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little")
