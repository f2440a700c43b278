"""A tokenizer and its critics train alike, however their rows and state are shared out."""

from dataclasses import replace

import pytest
import torch

from infra.cluster import Cluster
from infra.train import fit as fit_module
from infra.train import held_out, turn
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from t2i.pixels import scale
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, run_workers
from tests.t2i.judged import judged, panel

TASKS = {"judged": judged, "panel": panel}
LOSSES = {f"tokenizer/{name}" for name in ("reconstruction", "codebook", "commitment", "adversarial")}
STEPS = {"steps": 8, "save_every_steps": 8}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return {name: toy.plain(str(tmp_path_factory.mktemp("plain")), task(), **STEPS) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def reference(references):
    return references["judged"]


def alike(found, wanted, most):
    """The same losses at each step, and the same weights but for `most` of their norm."""
    (state, log), (wanted, wanted_log) = found, wanted
    assert len(log) == len(wanted_log)
    for losses, others in zip(log, wanted_log, strict=True):
        assert losses == pytest.approx(others, rel=1e-5, abs=1e-9)
    assert state.keys() == wanted.keys()
    assert max(distance(state, wanted, update) for update in ("tokenizer", "critic")) < most


def test_the_reference_learns_with_its_critic_asleep_and_awake(reference):
    _, log = reference
    assert [set(losses) for losses in log] == [LOSSES] * 2 + [LOSSES | {"critic/hinge"}] * 6
    assert [losses["tokenizer/adversarial"] != 0 for losses in log] == [False] * 2 + [True] * 6


def test_several_critics_share_a_turn_and_wake_one_by_one(references):
    state, log = references["panel"]
    assert [losses["tokenizer/adversarial_0"] != 0 for losses in log] == [False] * 2 + [True] * 6
    assert [losses["tokenizer/adversarial_1"] != 0 for losses in log] == [False] * 6 + [True] * 2
    assert ["critic/hinge_0" in losses for losses in log] == [False] * 2 + [True] * 6
    assert [losses.get("critic/hinge_1", 0) != 0 for losses in log] == [False] * 6 + [True] * 2
    assert {name for name in state if "/w/critic" in name} >= {
        "critic/w/critic.0.layers.0.weight", "critic/w/critic.1.layers.0.weight",
    }  # fmt: skip
    assert not any("critic" in name for name in state if name.startswith("tokenizer/"))
    # Until the second wakes, the losses are those that the first alone would have.
    for found, wanted in zip(log[:6], references["judged"][1], strict=False):
        assert found["tokenizer/adversarial_0"] == pytest.approx(wanted["tokenizer/adversarial"], rel=1e-6)
        assert found.get("critic/hinge_0", 0) == pytest.approx(wanted.get("critic/hinge", 0), rel=1e-6)


def test_one_critic_is_called_as_it_always_was(reference):
    state, _ = reference
    assert "critic/w/critic.layers.0.weight" in state
    assert {name.split("/")[2].split(".")[0] for name in state if name.startswith("critic/")} == {"critic"}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("micro_steps", [3, 6])
def test_micro_batches_change_nothing(tmp_path, references, micro_steps, name):
    """Ten rows by fours, or by twos: the last has two places without a row, or nothing else."""
    alike(toy.plain(str(tmp_path), TASKS[name](), micro_steps, **STEPS), references[name], 1e-5)


def test_a_weight_from_a_micro_batch_alone_would_show(tmp_path, reference, monkeypatch):
    """The comparison above means something."""
    monkeypatch.setattr(turn, "acquainted", lambda engine, micro_batches: micro_batches)
    _, log = toy.plain(str(tmp_path), judged(), 3, **STEPS)
    found, wanted = (one[2]["tokenizer/adversarial"] for one in (log, reference[1]))
    assert abs(found / wanted - 1) > 0.001


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_zero_trains_all_like_one_plain_process(tmp_path, references, world):
    jobs = [
        {"folder": str(tmp_path / f"{name}-{stage}-{steps}"), "stage": stage, "micro_steps": steps,
         "task": f"tests.t2i.judged:{name}", "config": STEPS}
        for name in TASKS
        for stage in (0, 1, 2)
        for steps in (1, 2)
    ]  # fmt: skip
    for job, log in zip(jobs, run_workers(tmp_path, world, jobs), strict=True):
        alike((final_state(job["folder"]), log), references[job["task"].partition(":")[2]], 1e-4)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_several_critics_that_are_cut_go_on_bit_equal(tmp_path, world):
    """Cut with the first critic awake and the second asleep."""
    jobs = []
    for stage in (0, 1, 2):
        job = {"stage": stage, "micro_steps": 1 + stage % 2, "task": "tests.t2i.judged:panel", "config": STEPS}
        cut = job | {"folder": str(tmp_path / f"{stage}-cut"), "config": {"steps": 8, "save_every_steps": 5}}
        jobs += [job | {"folder": str(tmp_path / f"{stage}")}, cut, cut | {"do": "tear"}, cut]
    results = run_workers(tmp_path, world, jobs)
    for stage in (0, 1, 2):
        losses, before, _, after = results[4 * stage : 4 * stage + 4]
        assert before == losses
        assert after == losses[5:]
        state, whole = final_state(tmp_path / f"{stage}-cut"), final_state(tmp_path / f"{stage}")
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_zero_3_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "connect", lambda cluster: pytest.fail("it started"))
    toy.write_rows(f"{tmp_path}/rows")
    training = Training(judged(), [f"{tmp_path}/rows"], TrainConfig(**STEPS), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="stage 2 or less"):
        fit([training], Cluster(name="spread", zero_stage=3), print)


def test_what_is_held_out_is_measured_by_the_tokenizers_own_losses():
    """In batches of which each is of several micro-batches, whose rows the critic's weight lets see each other."""
    batches = next(toy.feed(TrainConfig(**STEPS, batch=9), 0, 1, 3, judged())(0))
    update, _ = judged().updates()
    assert update.mixes_rows
    found = held_out.losses(replace(update, module=update.module.eval()), [batches, batches], 8)
    assert found.keys() == LOSSES - {"tokenizer/adversarial"}
    (whole,) = next(toy.feed(TrainConfig(**STEPS, batch=9), 0, 1, 1, judged())(0))
    images, tokenizer = scale(whole["images"]), update.module.tokenizer
    with torch.no_grad():
        rebuilt = tokenizer.reconstruct(tokenizer.quantize(images).vectors)
    assert found["tokenizer/reconstruction"] == pytest.approx(float((rebuilt - images).abs().mean()))
