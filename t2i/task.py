"""How anything that learns becomes Updates of the loop."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from infra.train import world
from infra.train.optim import OptimConfig
from infra.train.task import Update
from t2i.nn.weights import initialize
from t2i.protocol import Learner

TRAIN = "train"  # the split that is trained on


def updates_of(
    learner: Learner,
    optims: Mapping[str, OptimConfig],
    seed: int,
    loss_weights: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Update]:
    """The Updates of a learner's turns, its first weights made of `seed` and the names of the parameters.

    A learner that has `begin()` then takes weights from what it begins from. `optims` and `loss_weights` come by the
    turns' names; a turn without an optimizer's config takes that of the first one, and what is said here of a loss's
    weight stands above what the turn says.
    """
    turns = learner.turns()
    loaded = [f"{turn.name}.{name}" for turn in turns for name in turn.rebuilt]
    initialize(nn.ModuleDict({turn.name: turn.module for turn in turns}), seed, loaded)
    if (begin := getattr(learner, "begin", None)) is not None:
        begin()
    for turn in turns:
        if hasattr(turn.module, "gather"):
            turn.module.gather = world.rows  # type: ignore[assignment]
    told: dict[str, Any] = dict(loss_weights or {})
    return [
        Update(
            turn.name,
            turn.module,
            optims.get(turn.name, optims[turns[0].name]),
            {**turn.loss_weights, **told.get(turn.name, {})},
            start_step=turn.start_step,
            mixes_rows=turn.mixes_rows,
            rebuilt=turn.rebuilt,
        )
        for turn in turns
    ]
