"""A tokenizer and its critic train alike, however their rows and state are shared out."""

import pytest

from infra.cluster import Cluster
from infra.train import fit as fit_module
from infra.train import loop
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, run_workers
from tests.t2i.judged import judged

LOSSES = {f"tokenizer/{name}" for name in ("reconstruction", "codebook", "commitment", "adversarial")}
STEPS = {"steps": 8, "save_every_steps": 8}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return toy.plain(str(tmp_path_factory.mktemp("plain")), judged(), **STEPS)


def alike(found, wanted, most):
    """The same losses at each step, and the same weights but for `most` of their norm."""
    (state, log), (wanted, wanted_log) = found, wanted
    assert len(log) == len(wanted_log)
    for losses, others in zip(log, wanted_log, strict=True):
        assert losses == pytest.approx(others, rel=1e-5)
    assert state.keys() == wanted.keys()
    assert max(distance(state, wanted, update) for update in ("tokenizer", "critic")) < most


def test_the_reference_learns_with_its_critic_asleep_and_awake(reference):
    _, log = reference
    assert [set(losses) for losses in log] == [LOSSES] * 2 + [LOSSES | {"critic/hinge"}] * 6
    assert [losses["tokenizer/adversarial"] != 0 for losses in log] == [False] * 2 + [True] * 6


@pytest.mark.parametrize("micro_steps", [3, 6])
def test_micro_batches_change_nothing(tmp_path, reference, micro_steps):
    """Ten rows by fours, or by twos: the last has two places without a row, or nothing else."""
    alike(toy.plain(str(tmp_path), judged(), micro_steps, **STEPS), reference, 1e-5)


def test_a_weight_from_a_micro_batch_alone_would_show(tmp_path, reference, monkeypatch):
    """The comparison above means something."""
    monkeypatch.setattr(loop, "_acquainted", lambda engine, micro_batches: micro_batches)
    _, log = toy.plain(str(tmp_path), judged(), 3, **STEPS)
    found, wanted = (one[2]["tokenizer/adversarial"] for one in (log, reference[1]))
    assert abs(found / wanted - 1) > 0.001


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_zero_trains_both_like_one_plain_process(tmp_path, reference, world):
    jobs = [
        {"folder": str(tmp_path / f"{stage}-{steps}"), "stage": stage, "micro_steps": steps,
         "task": "tests.t2i.judged:judged", "config": STEPS}
        for stage in (0, 1, 2)
        for steps in (1, 2)
    ]  # fmt: skip
    for job, log in zip(jobs, run_workers(tmp_path, world, jobs), strict=True):
        alike((final_state(job["folder"]), log), reference, 1e-4)


def test_zero_3_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "connect", lambda cluster: pytest.fail("it started"))
    toy.write_rows(f"{tmp_path}/rows")
    training = Training(judged(), [f"{tmp_path}/rows"], TrainConfig(**STEPS), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="stage 2 or less"):
        fit([training], Cluster(name="spread", zero_stage=3), print)
