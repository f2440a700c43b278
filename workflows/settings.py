"""The DeepSpeed settings of every training of a recipe, made from the Cluster and shown before anything starts."""

from typing import Any

from infra.cluster import Cluster
from infra.train.loop import Trained
from infra.train.settings import settings
from workflows.commands import numbered
from workflows.kinds import Recipe, parts_of


def settings_of(recipe: Recipe, cluster: Cluster) -> dict[str, Any]:
    """By step and Update, what DeepSpeed is given when as many workers train as the Cluster may have.

    Fewer workers of an elastic Cluster take larger shares; `workers` of the Cluster says how many. Raises ValueError
    where the Cluster cannot train what is asked for.
    """
    shown: dict[str, Any] = {}
    for step, trainings in trainings_of(recipe).items():
        # One group of workers trains all of a step.
        workers = cluster.workers_for(max(training.config.batch for training in trainings))[1]
        updates = {}
        for config, optimizers, whole_weights in trainings:
            cluster.check(config.precision, whole_weights)
            micro_batch, micro_steps = cluster.micro_batches(config.batch, workers)
            for update, optim in optimizers.items():
                updates[update] = settings(
                    cluster.zero_stage, config.precision, micro_batch, micro_steps, optim.clip_norm, cluster.offload
                )
        shown[step] = {"workers": workers, "updates": updates}
    return shown


def trainings_of(recipe: Recipe) -> dict[str, list[Trained]]:
    """What each step of a recipe trains, in turn; later steps of a name are numbered."""
    trained = [(part.work.name, getattr(part.config, "trainings", [])) for part in parts_of(recipe)]
    trained = [(name, trainings) for name, trainings in trained if trainings]
    return dict(zip(numbered(name for name, _ in trained), (trainings for _, trainings in trained), strict=True))
