"""A tokenizer, and its critic, train on pictures of several shapes; cut or not, the numbers are the same."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra.data.fitting import bucket_name
from infra.data.images import encode_png
from infra.data.ledger import commit
from infra.store import Artifact
from infra.train.engine import PlainEngine
from infra.train.loop import Left, TrainConfig, train
from infra.train.optim import OptimConfig
from infra.train.worker import Training
from t2i.evaluate.reconstruction import reconstruction_scores
from t2i.nn.weights import initialize
from t2i.pixels import scale
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.task import check_sizes
from t2i.stages import Encode
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.task import TokenizerTask, build_tokenizer, load_tokenizer, save_tokenizer
from t2i.tokenizers.vqgan import VQGANConfig
from tests.infra.data.zoo import picture
from tests.infra.train import toy
from tests.infra.train.plainly import PlainFeed
from tests.infra.train.test_loop import Told
from tests.infra.train.workers import final_state, run_workers
from workflows.evaluate import reconstruct

SIZES = [(8, 16), (16, 8), (8, 8)]
SHARES = [2, 1, 1, 0, 1]  # sizes of one row after another
QUANTIZER = CodebookConfig(size=16, width=4)
MODELS = {
    "patch vqgan": PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=QUANTIZER),
    "finite scalar": PatchVQGANConfig(channels=32, groups=4, patch=2, quantizer=FiniteScalarConfig(levels=(8, 8, 8))),
    "vqgan": VQGANConfig(
        channels=8, groups=4, multipliers=(1, 2), blocks=1, attention_levels=(1,), latent_channels=8,
        quantizer=QUANTIZER,
    ),
}  # fmt: skip


def size_of(number):
    return SIZES[SHARES[number % len(SHARES)]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """An index of three shards with copies in buckets, as ingest makes them."""
    place = str(tmp_path_factory.mktemp("rows"))
    for shard in range(3):
        numbers = range(12 * shard, 12 * shard + 12)
        columns = {
            "sample_id": [f"{number:024x}"[::-1] for number in numbers],
            "state": ["accepted"] * 12,
            "reason": pa.nulls(12, pa.string()),
            "split": ["test" if number % 6 == 5 else "train" for number in numbers],
            "offset": [0] * 12,
            "bucket": [bucket_name(size_of(number)) for number in numbers],
            "image": [encode_png(picture(number, *size_of(number))) for number in numbers],
        }
        commit(place, f"{shard:06d}", pa.table(columns))
    return place


def training(rows, model="patch vqgan", critic=False, **options):
    task = TokenizerTask(
        model=MODELS[model],
        losses=LossConfig(),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, ema_decay=0.9),
        critic=CriticConfig(channels=8, layers=1, start_step=2) if critic else None,
        bucket="bucket",
    )
    config = TrainConfig(**{"steps": 14, "batch": 4, "log_every_steps": 1, "save_every_steps": 5, **options})
    return Training(task, [rows], config, rows)


def run(one, folder, micro_steps=1, watch=None):
    """Train in this process; returns the final state and all losses."""
    feed, log = PlainFeed(one, micro_steps=micro_steps), toy.Losses()
    arguments = (one.task, feed, PlainEngine, micro_steps, one.config, str(folder), log)
    saved = train(*arguments, *([watch] if watch else []))
    return toy.final_state(saved), log


@pytest.mark.parametrize(("model", "critic"), [("patch vqgan", False), ("patch vqgan", True), ("vqgan", False)])
def test_cut_anywhere_it_ends_bit_equal(rows, tmp_path, model, critic):
    one = training(rows, model, critic)
    plan = one.plan(one.count())
    assert plan.steps_per_epoch < one.config.steps, "more than an epoch"
    assert set(plan.of_steps(0, 0, plan.steps_per_epoch)[0].tolist()) == {0, 1, 2}
    whole, log = run(one, tmp_path / "whole")
    assert len(log) == one.config.steps
    for cut in [3, plan.steps_per_epoch] if model == "patch vqgan" else [plan.steps_per_epoch]:
        with pytest.raises(Left):
            run(one, tmp_path / f"{cut}", watch=Told(cut))
        state, rest = run(one, tmp_path / f"{cut}")
        assert list(rest) == list(log)[cut:]
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_micro_batches_change_nothing(rows, tmp_path):
    """Fours by twos: of a bucket's last step one micro-batch may have no row at all."""
    one = training(rows, critic=True)
    assert any(not batch["weight"].any() for batches in PlainFeed(one, micro_steps=2)(0) for batch in batches)
    whole, log = run(one, tmp_path / "whole")
    state, parts = run(one, tmp_path / "parts", micro_steps=2)
    for losses, others in zip(log, parts, strict=True):
        assert others == pytest.approx(losses, rel=1e-4)
    for name in whole:
        torch.testing.assert_close(state[name].float(), whole[name].float(), rtol=1e-3, atol=1e-5)


def work(jobs, result):
    """One worker of a DeepSpeed group that does training after training; rank 0 writes the losses of each."""
    from infra.train import world, zero

    torch.set_num_threads(1)
    zero.start("gloo")
    told = []
    for job in jobs:
        one, log, micro_steps = training(job["rows"], critic=True), toy.Losses(), job["micro_steps"]
        feed = PlainFeed(one, world.rank(), world.size(), micro_steps)
        train(one.task, feed, toy.worker_engine(job, one.config), micro_steps, one.config, job["folder"], log)
        told.append(log)
    if world.rank() == 0:
        Path(result).write_text(json.dumps(told))
    world.gather(None)
    os._exit(0)  # gloo sometimes aborts while it is torn down


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_workers_under_zero_train_like_one_plain_process(rows, tmp_path, world):
    """Of a bucket's last step one worker may have no row at all."""
    whole, log = run(training(rows, critic=True), tmp_path / "plain")
    jobs = [
        {"rows": rows, "folder": str(tmp_path / f"{stage}"), "stage": stage, "micro_steps": 1 + stage % 2}
        for stage in (0, 1, 2)
    ]
    for stage, found in enumerate(run_workers(tmp_path, world, jobs, work=work)):
        assert len(found) == len(log)
        for losses, others in zip(log, found, strict=True):
            assert others == pytest.approx(losses, rel=1e-4)
        state = final_state(tmp_path / f"{stage}")
        assert state.keys() == whole.keys()
        for name, value in state.items():
            torch.testing.assert_close(value.float(), whole[name].float(), rtol=1e-3, atol=1e-5, msg=name)


def test_it_learns_from_all_shapes(rows, tmp_path):
    one = training(rows, "finite scalar", steps=200, save_every_steps=200)
    plan = one.plan(one.count())
    _, log = run(one, tmp_path)
    bucket = np.concatenate([plan.of_steps(epoch, 0, plan.steps_per_epoch)[0] for epoch in range(30)])[:200]
    losses = np.array([losses["tokenizer/reconstruction"] for losses in log])
    for number in range(3):
        of_it = losses[bucket == number]
        assert of_it[-3:].mean() < 0.5 * of_it[:3].mean()


def test_rows_of_weight_0_change_nothing(rows):
    """The last step of a bucket, filled up, and the same rows without what fills it up."""
    one, gradients = training(rows), []
    short = next(batches[0] for batches in PlainFeed(one)(0) if batches[0]["weight"].min() == 0)
    there = short["weight"] > 0
    for batch in (short, {name: column[there] for name, column in short.items()}):
        (update,) = one.task.updates()
        sum(update.module({**batch, "step": torch.tensor(0)}).values()).backward()
        gradients.append([parameter.grad for parameter in update.module.parameters()])
        assert update.module.targets(batch)["reconstruction"] == there.sum()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_codes_of_pictures_of_several_sizes(tmp_path, model):
    tokenizer = build_tokenizer(MODELS[model])
    initialize(tokenizer, 0)
    save_tokenizer(tokenizer, str(tmp_path))
    stage, loaded = Encode(str(tmp_path)), load_tokenizer(str(tmp_path))
    stage.setup()
    pictures = [picture(number, *size_of(number)) for number in range(10)]
    found = stage({"pixels": pictures})["codes"]
    for codes, pixels in zip(found, pictures, strict=True):
        alone = loaded.encode(scale(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]))
        assert len(codes) == np.prod(loaded.space(pixels.shape[:2]).shape)
        assert np.array_equal(codes, alone.flatten().numpy())


def test_reconstructions_of_pictures_of_several_sizes(tmp_path):
    (tmp_path / "model").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_tokenizer(build_tokenizer(MODELS["patch vqgan"]), str(tmp_path / "model"))
    tokenizer = Artifact(str(tmp_path), {})
    pictures = [picture(number, *size_of(number)) for number in range(10)]
    found, _ = reconstruct(tokenizer, pictures, batch=2)
    for rebuilt, pixels in zip(found, pictures, strict=True):
        (alone,), _ = reconstruct(tokenizer, [pixels])
        assert rebuilt.shape == pixels.shape
        assert np.abs(rebuilt.astype(int) - alone).max() <= 1
    assert reconstruction_scores(pictures, found)["n"] == 10


def test_a_prior_hears_several_sizes_only_if_it_says_so(monkeypatch):
    config = AutoregressiveConfig()
    check_sizes(config, ["8x8"])
    with pytest.raises(ValueError, match=r"of AutoregressiveConfig learns .* give them 2 \(8x8, 8x16\)"):
        check_sizes(config, ["8x8", "8x16"])
    monkeypatch.setattr(AutoregressiveConfig, "several_grids", True, raising=False)
    check_sizes(config, ["8x8", "8x16"])
