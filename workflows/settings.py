"""The DeepSpeed settings of every training of a recipe, made from the Cluster and shown before anything starts."""

from typing import Any, NamedTuple

from infra.cluster import Cluster
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from infra.train.settings import settings
from workflows.text_to_image import Recipe
from workflows.train_captioner import TrainCaptionerConfig


class Training(NamedTuple):
    """How long and on how much, the optimizer of each Update by its name, and whether all weights are needed whole."""

    config: TrainConfig
    optimizers: dict[str, OptimConfig]
    whole_weights: bool = False


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


def trainings_of(recipe: Recipe) -> dict[str, list[Training]]:
    """What each step of a recipe trains, in turn."""
    captioner, tokenizer, prior = recipe.captioner, recipe.tokenizer, recipe.prior
    captioners: list[Training] = []
    if isinstance(captioner, TrainCaptionerConfig):
        if captioner.base is not None:
            captioners.append(Training(captioner.base, {"base": captioner.base_optim}))
        if captioner.filter is not None:
            captioners.append(Training(captioner.filter, {"filter": captioner.filter_optim}))
        if captioner.styles:
            captioners.append(Training(captioner.finetune, {"finetune": captioner.finetune_optim}))
    tokenizers = {"tokenizer": tokenizer.optim}
    if tokenizer.critic is not None:
        tokenizers["critic"] = tokenizer.critic_optim or tokenizer.optim
    steps = {
        "train_captioner": captioners,
        "train_tokenizer": [Training(tokenizer.train, tokenizers, tokenizer.critic is not None)],
        "train_prior": [Training(prior.train, {"prior": prior.optim})],
    }
    return {step: trainings for step, trainings in steps.items() if trainings}
