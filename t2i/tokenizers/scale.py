"""What brings a tokenizer's continuous values to about unit variance, and back; nobody else knows a factor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
