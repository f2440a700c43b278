"""The words of the house: what tokenizers, priors, and all that a prior is told have in common.

Shapes: B rows, S tokens, D width, (C, h, w) planes. A batch is a dict of tensors whose first axis is B, as the feed
gives it: `weight` (B,) float32, 0 for padding, `step`, the training step as a scalar, and what a model's `Rows` wrote.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Batch = Mapping[str, torch.Tensor]
Draw = Callable[[str], np.ndarray]  # draw(salt): (B,) uniforms in [0, 1), a function of (seed, epoch, sample id, salt)


@dataclass(frozen=True)
class Space:
    """Where the values of one picture live."""

    shape: tuple[int, ...]  # (h, w) or (n,) codes; (C, h, w) latents or pixels; (D,) an embedding
    codes: int = 0  # how many codes there are; 0: the values are continuous
    bound: float | None = None  # pixels lie within [-bound, bound]; None: about unit variance, without a bound

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1 or self.codes < 0:
            raise ValueError(f"A space has sides of at least 1 and no negative number of codes, but this is {self}.")

    @property
    def places(self) -> int:
        """How many values a picture has."""
        return math.prod(self.shape)


class Turn(NamedTuple):
    """One optimizer's turn within a training step. A config holds the OptimConfig of each turn by its name."""

    name: str
    module: nn.Module  # (batch) -> named sums; `targets(batch)`: how many targets each runs over
    start_step: int = 0  # the turn sleeps before this training step
    mixes_rows: bool = False  # rows see each other: `Update.mixes_rows` of the loop
    loss_weights: Mapping[str, float] = {}  # a loss that is not named weighs 1
    rebuilt: tuple[str, ...] = ()  # submodules that were loaded, not trained: checkpoints leave what is frozen out


class Learner(Protocol):
    """What a Task trains: a tokenizer, a prior, a guide, an adapter. A module.

    One that begins with weights of another, such as a student's with its teacher's, takes them in `begin()`, which is
    called when all first weights were filled.
    """

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """How many targets each loss sums over, by name; rows of weight 0 count nothing."""
        ...

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The sums of its losses by the same names; the loop divides by the targets of the global batch."""
        ...

    def turns(self) -> list[Turn]:
        """Its own turn first; a turn with its critics may follow. Nobody registers the module of another's turn."""
        ...


class Tokenizer(Protocol):
    """Images (B, 3, H, W) floats in [-1, 1], of any ratio, to values and, mostly, back.

    Continuous values are about of unit variance: a tokenizer scales them. It may have `moments(images)`, mean and
    deviation of values that are drawn, and, beside codes, `latents(images)` of a `latent_space(size)`, which it decodes
    as well: codes are whole numbers, latents floats.
    """

    decodes: bool  # the embedding of a picture does not

    def space(self, size: tuple[int, int]) -> Space:
        """Of images of `size` (height, width); ValueError where the size does not fit."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Values (B, *shape): codes int64 in [0, codes), or the mode of continuous ones."""
        ...

    def decode(self, values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1]."""
        ...


class Told(NamedTuple):
    """All that a network may be told."""

    vector: torch.Tensor | None = None  # (B, D), beside the time
    tokens: torch.Tensor | None = None  # (B, S, D), for cross-attention or as a prefix
    seen: torch.Tensor | None = None  # (B, S) bool: the others are padding. None: all of them
    planes: torch.Tensor | None = None  # (B, C, h, w), beside x
    levels: tuple[torch.Tensor, ...] = ()  # added at the end of each level of an encoder (T2I-Adapter)
    skips: tuple[torch.Tensor, ...] = ()  # added to skip connections, the last to the middle (ControlNet)

    @property
    def said(self) -> frozenset[str]:
        """The names of what is told."""
        return frozenset(name for name in self._fields if getattr(self, name) not in (None, ()))


def joined(told: Iterable[Told]) -> Told:
    """Several tellings as one: tokens and planes end to end in this order, vectors, levels and skips summed."""
    several = list(told)
    if len(several) == 1:
        return several[0]
    tokens = [each.tokens for each in several if each.tokens is not None]
    seen = [_seen(each) for each in several if each.tokens is not None]
    planes = [each.planes for each in several if each.planes is not None]
    return Told(
        vector=_sum([each.vector for each in several if each.vector is not None]),
        tokens=torch.cat(tokens, dim=1) if tokens else None,
        seen=torch.cat(seen, dim=1) if seen else None,
        planes=torch.cat(planes, dim=1) if planes else None,
        levels=_sums([each.levels for each in several if each.levels]),
        skips=_sums([each.skips for each in several if each.skips]),
    )


def stacked(first: Told, second: Told) -> Told:
    """The rows of one telling, then those of another; fewer tokens are padded."""
    if first.said | {"seen"} != second.said | {"seen"}:
        raise ValueError("Two tellings of one prior say the same kinds of things.")
    tokens, seen = _padded(first, second)
    return Told(
        vector=_cat(first.vector, second.vector),
        tokens=tokens,
        seen=seen,
        planes=_cat(first.planes, second.planes),
        levels=tuple(torch.cat(pair) for pair in zip(first.levels, second.levels, strict=True)),
        skips=tuple(torch.cat(pair) for pair in zip(first.skips, second.skips, strict=True)),
    )


def _padded(*told: Told) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if told[0].tokens is None:
        return None, None
    tokens = [each.tokens for each in told if each.tokens is not None]
    length = max(each.shape[1] for each in tokens)
    seen = [_seen(each) for each in told]
    return (
        torch.cat([functional.pad(each, (0, 0, 0, length - each.shape[1])) for each in tokens]),
        torch.cat([functional.pad(each, (0, length - each.shape[1])) for each in seen]),
    )


def _cat(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _seen(told: Told) -> torch.Tensor:
    """(B, S) bool of a telling that has tokens."""
    assert told.tokens is not None
    return told.tokens.new_ones(told.tokens.shape[:2], dtype=torch.bool) if told.seen is None else told.seen


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return functools.reduce(torch.add, tensors) if tensors else None


def _sums(several: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    if len({len(each) for each in several}) > 1:
        raise ValueError(f"What is added at levels comes for {sorted({len(each) for each in several})} levels at once.")
    return tuple(functools.reduce(torch.add, each) for each in zip(*several, strict=True))


class Rows(Protocol):
    """Rows of a corpus to arrays: NumPy alone. It runs in the feed, and on prompts when pictures are drawn."""

    def __call__(self, rows: Mapping[str, list], draw: Draw | None) -> dict[str, np.ndarray]:
        """`rows` has the columns that the config `reads`, B values each; returns arrays with first axis B.

        Without a `draw` pictures are asked for: nothing is corrupted then.
        """
        ...


class ConditionConfig(Protocol):
    """Which condition; a frozen dataclass."""

    @property
    def name(self) -> str:
        """Its own among the conditions of a prior: its columns of a batch begin with it."""
        ...

    @property
    def drop(self) -> float | None:
        """The share of rows to which its null is told in training; None: the share that the training says."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of the corpus that its rows are made of; `caption` is the caption that was drawn for a row."""
        ...

    def rows(self, folder: str) -> Rows:
        """How its arrays are made, with what it keeps in a local folder beside the model (a vocabulary)."""
        ...

    def build(self, width: int, space: Space) -> "Condition":
        """The module, for a network of a width that draws in a space."""
        ...


class Condition(Protocol):
    """One thing that a prior is told. A module."""

    name: str
    says: frozenset[str]  # fields of Told
    length: int  # of its tokens, at most; 0 where it says none
    channels: int  # of its planes

    def __call__(self, batch: Batch, dropped: torch.Tensor) -> Told:
        """What rows are told; where `dropped` (B,) bool, its null. Of tokens every row sees at least one.

        What a row is told depends on that row alone, however far others of the batch are padded.
        """
        ...

    def load(self, folder: str) -> None:
        """Take what it keeps in a local folder beside its weights, such as the null of a frozen encoder."""
        ...


@dataclass(frozen=True)
class Asked:
    """What pictures are asked for: the conditions' arrays of B rows and, under `without`, negative prompts.

    `without` holds the arrays of the conditions that are `negated`, such as the words of what is not wanted; they stand
    where guidance else puts those conditions' nulls.
    """

    rows: int
    batch: Batch = field(default_factory=dict)
    without: Batch = field(default_factory=dict)
    negated: frozenset[str] = frozenset()

    def to(self, device: torch.device) -> "Asked":
        """The same on a device."""
        batch, without = (
            {name: column.to(device) for name, column in each.items()} for each in (self.batch, self.without)
        )
        return Asked(self.rows, batch, without, self.negated)


@dataclass(frozen=True)
class Start:
    """Where drawing begins, in place of pure noise.

    `values` (B, *shape) lie at time `at` of the prior's own process, with that time's noise in them where `noised`,
    else the prior adds it. `keep` (B or 1, *shape or broadcastable) bool: values that stay as they are (inpainting);
    in these there is no noise in any case.
    """

    values: torch.Tensor
    at: float | None = None
    noised: bool = False
    keep: torch.Tensor | None = None


class Prior(Learner, Protocol):
    """Draws values of a space."""

    space: Space

    def sample(self, asked: Asked, seeds: Sequence[int], sampling: Any, start: Start | None = None) -> torch.Tensor:
        """Values (B, *shape), row b drawn from `seeds[b]` alone. `sampling` is the config of the prior's family."""
        ...
