"""What `rescribe settings` prints is what the trainings hand to DeepSpeed, and DeepSpeed reads it as it was meant."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.cluster import CLUSTERS, Cluster
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from infra.train.settings import settings
from infra.train.task import Update
from t2i.tokenizers.task import TokenizerTask
from workflows.__main__ import main
from workflows.recipes import demo, emoji, nlvr
from workflows.settings import settings_of, trainings_of

RECIPES = {"demo": demo(), "nlvr": nlvr("corpus"), "emoji": emoji("corpus")}


@given(st.integers(1, 512), st.integers(1, 64), st.integers(0, 64))
def test_the_workers_take_the_whole_batch_and_less_than_a_round_too_much(batch, workers, limit):
    rows, steps = Cluster(name="test", micro_batch=limit).micro_batches(batch, workers)
    assert 1 <= rows <= (limit or batch)
    assert rows * steps * workers >= batch
    assert rows * (steps - 1) * workers < batch


def test_the_command_prints_what_was_asked_for(capsys):
    arguments = ["--cluster", "one_node", "--cluster.zero-stage", "3", "--cluster.micro-batch", "3"]
    main(["settings", "demo", *arguments, "--prior.train.batch", "100", "--prior.optim.clip-norm", "0.5"])
    prior = json.loads(capsys.readouterr().out)["train_prior"]
    assert prior["workers"] == 8
    assert prior["updates"]["prior"] == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,  # 13 rows a worker
        "gradient_clipping": 0.5,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 50_000_000},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    main(["settings", "demo", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"train_captioner", "train_tokenizer", "train_prior"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_update_of_every_training_is_there(name):
    recipe = RECIPES[name]
    shown = settings_of(recipe, CLUSTERS["one_node"]())
    tokenizer = recipe.tokenizer
    task = TokenizerTask(
        model=tokenizer.model,
        losses=tokenizer.losses,
        optim=tokenizer.optim,
        critic=tokenizer.critic,
        critic_optim=tokenizer.critic_optim,
        seed=0,
    )
    updates = {update.name: update.optim.clip_norm for update in task.updates()}
    assert trainings_of(recipe)["train_tokenizer"][0].whole_weights == task.whole_weights
    given = shown["train_tokenizer"]["updates"]
    assert {update: one["gradient_clipping"] for update, one in given.items()} == updates
    assert set(shown["train_captioner"]["updates"]) == {"base", "finetune"}
    assert set(shown["train_prior"]["updates"]) == {"prior"}


def test_a_critic_is_not_shown_under_zero_3():
    cluster = replace(CLUSTERS["laptop"](), zero_stage=3)
    with pytest.raises(ValueError, match="a tokenizer and its critic, compute with each other's"):
        settings_of(RECIPES["emoji"], cluster)
    recipe = replace(RECIPES["emoji"], tokenizer=replace(RECIPES["emoji"].tokenizer, critic=None))
    assert set(settings_of(recipe, cluster)["train_tokenizer"]["updates"]) == {"tokenizer"}


def test_what_is_not_trained_is_not_shown():
    recipe = RECIPES["demo"]
    only_base = replace(recipe, captioner=replace(recipe.captioner, styles=()))
    assert set(settings_of(only_base, CLUSTERS["laptop"]())["train_captioner"]["updates"]) == {"base"}


def test_a_filter_is_shown_between_the_base_and_the_styles():
    recipe = demo()
    recipe = replace(recipe, captioner=replace(recipe.captioner, filter=TrainConfig(steps=10)))
    shown = settings_of(recipe, CLUSTERS["laptop"]())
    assert list(shown["train_captioner"]["updates"]) == ["base", "filter", "finetune"]


def test_the_trainings_of_a_step_share_their_workers():
    """One group trains base and fine-tuning: the small batch of the one is spread over the workers of the other."""
    recipe, cluster = RECIPES["nlvr"], Cluster(name="test", workers=(1, 8), rows_per_worker=8)
    assert (recipe.captioner.base.batch, recipe.captioner.finetune.batch) == (64, 32)
    captioner = settings_of(recipe, cluster)["train_captioner"]
    rows = {name: one["train_micro_batch_size_per_gpu"] for name, one in captioner["updates"].items()}
    assert (captioner["workers"], rows) == (8, {"base": 8, "finetune": 4})


@pytest.mark.timeout(120)
def test_the_engine_hands_over_the_same_and_deepspeed_understands_it(monkeypatch):
    from infra.train import zero

    class HandedOverError(Exception):
        pass

    def initialize(*, config, **_):
        raise HandedOverError(config)

    monkeypatch.setattr(zero.deepspeed, "initialize", initialize)
    update = Update("toy", torch.nn.Linear(2, 2), OptimConfig(clip_norm=0.25))
    with pytest.raises(HandedOverError) as caught:
        zero.ZeroEngine(update, 5, None, stage=2, precision="bf16", micro_batch=3)
    config = caught.value.args[0]
    assert config == settings(2, "bf16", 3, 5, 0.25)
    read = zero.deepspeed.runtime.config.DeepSpeedConfig(config)
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (3, 5)
    assert (read.gradient_clipping, read.zero_optimization_stage) == (0.25, 2)
    assert read.torch_autocast_enabled
    assert read.torch_autocast_dtype == torch.bfloat16
    assert read.torch_autocast_lower_precision_safe_modules == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
def test_deepspeed_reads_every_setting_that_a_cluster_allows(stage, offload, precision):
    from infra.train import zero

    try:
        cluster = Cluster(name="test", gpus_per_worker=1, zero_stage=stage, offload=offload)
    except ValueError:
        assert stage < {"none": 0, "optimizer": 1, "parameters": 3}[offload]
        return
    config = settings(cluster.zero_stage, precision, 3, 5, 0.25, cluster.offload)
    read = zero.deepspeed.runtime.config.DeepSpeedConfig(config)
    assert read.zero_optimization_stage == stage
    assert read.gradient_clipping == (0.25 if stage else 0)  # at stage 0 the engine clips
    assert read.torch_autocast_enabled == (precision != "fp32")
    assert not read.float16_config.enabled
    assert not read.bfloat16_config.enabled
    if precision != "fp32":
        assert read.torch_autocast_dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    moved = {"offload_optimizer": offload != "none", "offload_param": offload == "parameters"}
    for name, wanted in moved.items():
        one = getattr(read.zero_config, name)
        assert (one is not None) == wanted
        assert one is None or (one.device == "cpu" and one.pin_memory)
    assert read.zero_force_ds_cpu_optimizer == (offload == "none")


def test_the_command_shows_offload_and_refuses_what_cannot_be(capsys):
    arguments = ["--cluster", "one_node", "--cluster.zero-stage", "3", "--cluster.offload", "parameters"]
    main(["settings", "demo", *arguments])
    prior = json.loads(capsys.readouterr().out)["train_prior"]["updates"]["prior"]
    host = {"device": "cpu", "pin_memory": True}
    assert prior["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 50_000_000,
        "offload_optimizer": host,
        "offload_param": host,
    }
    assert prior["zero_force_ds_cpu_optimizer"] is False
    recipe = RECIPES["demo"]
    half = replace(recipe, prior=replace(recipe.prior, train=replace(recipe.prior.train, precision="fp16")))
    with pytest.raises(ValueError, match="fp16 is for GPUs"):
        settings_of(half, CLUSTERS["laptop"]())
    shown = settings_of(half, CLUSTERS["one_node"]())["train_prior"]["updates"]["prior"]
    assert shown["torch_autocast"] == {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}
