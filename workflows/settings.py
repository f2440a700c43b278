"""The DeepSpeed settings of every training of a recipe, made from the Cluster and shown before anything starts."""

from typing import Any

from infra.cluster import Cluster
from infra.train.settings import Trained, settings
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
    """What each step of a recipe trains, in turn; of several steps of a name the later ones are numbered."""
    found: dict[str, list[Trained]] = {}
    for part in parts_of(recipe):
        if trainings := getattr(part.config, "trainings", []):  # as configs of steps that train have them
            count = sum(name.split()[0] == part.work.name for name in found)
            found[f"{part.work.name} {count + 1}" if count else part.work.name] = trainings
    return found
