"""What brings a tokenizer's continuous values to about unit variance, and back; nobody else knows a factor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

LEAST = 1e-3  # of the deviation of all channels, what a channel's own is taken for at least: a dead one is not blown up


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How a tokenizer's scale is measured."""

    rows: int = 4096  # training rows, the first by sample id, at most
    channels: bool = False  # a factor and a shift for each channel, in place of one of each

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"A scale is measured on at least one row, but rows is {self.rows}.")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values are (latents - shift) * factor, the numbers of diffusers' `shift_factor` and `scaling_factor`.

    There is one of each, or one for each channel, which is the second axis of values.
    """

    factor: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if len(self.factor) != len(self.shift) or not self.factor:
            raise ValueError(f"A scale has as many factors as shifts, but {self.factor} and {self.shift}.")
        if not all(map(math.isfinite, (*self.factor, *self.shift))) or min(self.factor) <= 0:
            raise ValueError(f"A scale's factors are above 0, and all of it is finite, but it is {self}.")

    def to(self, latents: torch.Tensor) -> torch.Tensor:
        """Values of about unit variance, (B, D, ...)."""
        return (latents - self._of(self.shift, latents)) * self._of(self.factor, latents)

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """The latents that `to` made values of."""
        return values / self._of(self.factor, values) + self._of(self.shift, values)

    def spread(self, deviations: torch.Tensor) -> torch.Tensor:
        """Deviations of values from those of latents."""
        return deviations * self._of(self.factor, deviations)

    def _of(self, numbers: Sequence[float], values: torch.Tensor) -> torch.Tensor | float:
        if len(numbers) == 1:
            return numbers[0]
        if len(numbers) != values.shape[1]:
            raise ValueError(f"This scale is of {len(numbers)} channels, but values have {values.shape[1]}.")
        return values.new_tensor(numbers).view(-1, *[1] * (values.dim() - 2))


class Sums(NamedTuple):
    """What a picture adds to a measure, in float64; of each channel a number."""

    count: float  # of latents
    means: list[float]
    squares: list[float]  # of differences from the mean, summed


def sums_of(latents: np.ndarray) -> Sums:
    """Of one picture's latents (D, ...)."""
    flat = latents.astype(np.float64).reshape(len(latents), -1)
    means = flat.mean(axis=1)
    return Sums(flat.shape[1], means.tolist(), np.square(flat - means[:, None]).sum(axis=1).tolist())


def measured(rows: Sequence[Sums], channels: bool = False) -> Scale:
    """The scale that brings the latents of pictures to mean 0 and variance 1, or those of each of the channels.

    Sums are rounded once, whatever the order of rows. ValueError where latents do not differ, or are no numbers.
    """
    count = math.fsum(row.count for row in rows)
    weighed = zip(*([row.count * mean for mean in row.means] for row in rows), strict=True)
    means = [math.fsum(each) / count for each in weighed]
    if not all(map(math.isfinite, means)):
        raise _told_apart(len(rows), math.nan)
    own = [
        math.fsum(row.squares[channel] + row.count * (row.means[channel] - mean) ** 2 for row in rows) / count
        for channel, mean in enumerate(means)
    ]
    mean = math.fsum(means) / len(means)
    whole = math.fsum(var + (each - mean) ** 2 for var, each in zip(own, means, strict=True)) / len(means)
    deviation = math.sqrt(whole) if whole > 0 else whole
    if not (math.isfinite(deviation) and deviation > 0):
        raise ValueError(
            f"The latents of {len(rows)} pictures have the deviation {deviation}: they tell nothing apart."
        )
    if not channels:
        return Scale(factor=(1 / deviation,), shift=(mean,))
    least = LEAST * math.sqrt(math.fsum(own) / len(own)) or deviation
    return Scale(factor=tuple(1 / max(math.sqrt(var), least) for var in own), shift=tuple(means))


def _told_apart(rows: int, deviation: float) -> ValueError:
    return ValueError(f"The latents of {rows} pictures have the deviation {deviation}: they tell nothing apart.")
