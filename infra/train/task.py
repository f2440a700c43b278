"""What the one loop trains: a Task builds Updates and turns rows into batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from infra.train.optim import OptimConfig

Batch = dict[str, torch.Tensor]
"""Columns of one micro-batch, first axis B; always with `"weight"` (B,) float32: 1 for a row, 0 for padding, and, from
the feed, `"id"` (B,) int64: the row's numeric id.

The loop adds `"step"`, the training step as a scalar, for what changes in the course of a training: targets, too.
"""

Losses = dict[str, torch.Tensor]
"""Named scalar sums of a loss over its targets; rows of weight 0 contribute nothing.

Tensors without a gradient may stand beside them, under names that `targets` does not have: sums for `stepped`.
"""

Draw = Callable[[str], np.ndarray]
"""`draw(salt)`: (B,) float64 uniforms in [0, 1), one a row, a function of (seed, epoch, sample id, salt) alone."""


@dataclass
class Update:
    """One optimizer's turn within a training step: a tokenizer with a critic has two.

    `module(batch)` returns `Losses`; `module.targets(batch)` returns, under the same names, how many targets each sum
    runs over (scalars that depend on the batch alone). The loop divides by the count over the whole global batch, so
    gradients do not depend on how many workers or micro-batches shared the work.

    Where the module has `stepped(sums)`, it is called without gradients after each optimizer step that was taken (in
    fp16 some are not), on every worker alike. So buffers and frozen parameters of the module may follow: a codebook, an
    average of the weights. `sums` has, by name, the totals over all micro-batches and workers of what `forward` gave
    beside losses; only the Update's own forward passes of this very step count. What it computes may depend on `sums`
    and on what the module holds alone, and is part of a checkpoint where it is in persistent buffers or in parameters.
    Under ZeRO 3 it may use buffers; if it uses parameters, the Task needs `whole_weights`.
    """

    name: str
    module: torch.nn.Module
    optim: OptimConfig
    loss_weights: Mapping[str, float] = field(default_factory=dict)  # a loss that is not named here weighs 1
    start_step: int = 0  # the update sleeps before this training step
    # Rows see each other. Given `"survey"`, the module returns columns (B, ...) that all rows of the global batch are
    # to see. It gathers them over workers itself, by `world.rows`, or finds them in the batch as `all_<name>`, where
    # the loop gathered them over micro-batches, too, by the same. With `weight` among the columns, these are the rows
    # of weight above 0 in the plan's order, on any number of workers; the micro-batch's own begin at `all_first`, and
    # its rows of weight 0 have no place. Lengths may differ: the end is padded with 0 up to the longest. Losses then
    # have the value of the micro-batch's rows, and the gradient of the global loss in what these rows showed. A column
    # may be (1, ...): of all its rows.
    mixes_rows: bool = False
    # Submodules of the module, by name, that `Task.updates` makes anew each time, as from a folder. What is frozen in
    # them, and their buffers, are neither written into a checkpoint nor wanted from one, and may be of any precision;
    # what is trained in them (LoRA) is saved like all else.
    rebuilt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.rebuilt:
            self.module.get_submodule(name)  # AttributeError where there is none


class Task(Protocol):
    """A small picklable record that says what is trained, on which rows, and what is kept."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that `collate` needs; `sample_id` is always there, `pixels` is the decoded (H, W, 3) uint8 image."""
        ...

    @property
    def where_reads(self) -> tuple[str, ...]:
        """Columns that `where` needs."""
        ...

    @property
    def bucket(self) -> str | None:
        """A column: rows of one training step have one value of it, as pictures of one shape. None: any rows meet."""
        ...

    @property
    def whole_weights(self) -> bool:
        """Whether every worker needs all weights: an Update computes with those of another, or follows its own after a
        step (`stepped`). Not under ZeRO 3.
        """
        ...

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """The rows to train on, as a boolean mask."""
        ...

    def updates(self) -> list[Update]:
        """Fresh modules on the CPU, initialised from the task's own seed."""
        ...

    def picks(self, rows: dict[str, list], draw: Draw) -> Mapping[str, Sequence[str | None]]:
        """Which further column each row has, by the name under which `collate` finds its value: None for no value.

        `rows` are the columns of `reads` that are narrow, such as texts, and numbers. So of features of several
        captions those alone are read whose caption is drawn. `draw` gives what it gives in `collate`. `{}`: no column.
        """
        ...

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """One batch as arrays, first axis B; runs in the feed, on CPU workers of any node."""
        ...

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """Write what users load (safetensors and a config) into a local folder; modules come by Update name."""
        ...


@runtime_checkable
class Painter(Protocol):
    """What a Task has beside that shows what it has learned in pictures, while it trains."""

    @property
    def paints(self) -> int:
        """Of how many held-out rows pictures are drawn; 0: of none."""
        ...

    def asks(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """What `paint` takes of rows as `collate` gets them, and `prompt` (B,), what each is to show, in words."""
        ...

    def paint(self, modules: dict[str, torch.nn.Module], batch: Batch) -> Sequence[np.ndarray]:
        """(H, W, 3) uint8 a row, all of one size and always the same; modules come by Update name, as in `export`."""
        ...
