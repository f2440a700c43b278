"""One optimizer's turn within a training step: micro-batches, the mean of each loss, and what follows the weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from infra.train import world
from infra.train.engine import Engine
from infra.train.flops import Flops
from infra.train.optim import learning_rate
from infra.train.settings import Precision
from infra.train.task import Batch, Losses
from infra.trouble import is_out_of_memory


class Diverged(FloatingPointError):  # noqa: N818 - a kind of FloatingPointError
    """A loss or a gradient of a training step is no finite number, or a loss has exploded: `Diverged(text, step)`."""

    def __str__(self) -> str:
        return self.args[0]

    @property
    def step(self) -> int:
        """The training step, from 1."""
        return self.args[1]


class DoesNotFitError(RuntimeError):
    """A worker's memory is too small for so many rows at once: `DoesNotFitError(text, rows, out of the training)`."""

    def __str__(self) -> str:
        return self.args[0]

    @property
    def rows(self) -> int:
        """Of the micro-batch."""
        return self.args[1]

    @property
    def out(self) -> str:
        """The folder of the training."""
        return self.args[2]


@contextmanager
def fitting(rows: int) -> Iterator[None]:
    """Turn want of memory into DoesNotFitError, which names how many rows were taken at once."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise DoesNotFitError(f"{rows} rows at once do not fit into a worker's memory ({said}).", rows, "") from None


def counted(
    engines: list[Engine], micro_batches: list[Batch], leaving: bool
) -> tuple[dict[str, dict[str, float]], bool]:
    """Targets of each loss of each Update over the global batch, and whether any worker is to leave; one collective.

    A count is at least 1, so that a batch without targets gives a loss of 0.
    """
    sums: dict[tuple[str, str], float] = {}
    for engine in engines:
        for batch in micro_batches:
            for name, count in engine.update.module.targets(batch).items():  # type: ignore[operator]
                key = (engine.update.name, name)
                sums[key] = sums.get(key, 0.0) + float(count)
    keys = sorted(sums)
    *totals, leavers = world.total(torch.tensor([*(sums[key] for key in keys), float(leaving)])).tolist()
    counts: dict[str, dict[str, float]] = {}
    for (update, name), value in zip(keys, totals, strict=True):
        counts.setdefault(update, {})[name] = max(1.0, value)
    return counts, leavers > 0


def turn(
    engine: Engine,
    micro_batches: list[Batch],
    counts: dict[str, float],
    step: int,
    steps: int,
    precision: Precision,
    flops: Flops,
) -> dict[str, torch.Tensor]:
    """One optimizer step of one Update: the mean of each loss over all valid targets of the global batch.

    Where the step was taken, the module is told so, with the sums over the global batch of what its forward pass gave
    beside losses. What it gave in a step that was not taken is gone.
    """
    update = engine.update
    if update.mixes_rows and len(micro_batches) > 1:
        with flops.surveyed(update, step, sum(len(batch["weight"]) for batch in micro_batches)):
            micro_batches = acquainted(engine, micro_batches)
    sums: dict[str, torch.Tensor] = {}
    seen, follows = {}, hasattr(update.module, "stepped")
    for number, batch in enumerate(micro_batches):
        first = flops.counted(update, step, len(batch["weight"])) if not number else nullcontext(lambda: None)
        with first as forward_ends:
            given = engine(batch)
            forward_ends()
            losses = {name: value for name, value in given.items() if name in counts}
            terms = [update.loss_weights.get(name, 1.0) * value / counts[name] for name, value in losses.items()]
            engine.backward(torch.stack([term.float() for term in terms]).sum())
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu()
        for name in given.keys() - counts.keys():
            assert follows, f"targets() of '{update.name}' does not count its loss '{name}'."
            assert not given[name].requires_grad, f"What a step of '{update.name}' leads to has no gradient: '{name}'."
            seen[name] = seen.get(name, 0) + given[name]
    lr = learning_rate(update.optim, step - update.start_step, steps - update.start_step)
    try:
        norm = engine.step(lr)
    except FloatingPointError as error:
        raise Diverged(f"'{update.name}' at step {step + 1}: {error}", step + 1) from None
    if not math.isfinite(norm) and precision != "fp16":  # there it marks a step that the scale was too large for
        raise Diverged(f"The gradient of '{update.name}' is no finite number at step {step + 1}.", step + 1)
    if follows and math.isfinite(norm):
        engine.stepped({name: world.total(seen[name]) for name in sorted(seen)})
    figures = {f"{update.name}/{name}": value / counts[name] for name, value in sums.items()}
    return figures | {f"{update.name}/lr": torch.tensor(lr), f"{update.name}/grad_norm": torch.tensor(norm)}


def acquainted(module: Callable[[Batch], Losses], micro_batches: list[Batch]) -> list[Batch]:
    """Micro-batches that bring what all rows of the global batch show of themselves (GradCache, arXiv 2101.06983).

    A forward pass more, without gradients: else rows would see those of their own micro-batch alone, and how memory is
    shared out would change what is learned.
    """
    with torch.no_grad():
        shown = [module({**batch, "survey": torch.tensor(True)}) for batch in micro_batches]
    seen = world.rows(*shown)
    firsts = seen.pop("first")
    columns = {f"all_{name}": column for name, column in seen.items()}
    return [{**batch, **columns, "all_first": first} for batch, first in zip(micro_batches, firsts, strict=True)]
