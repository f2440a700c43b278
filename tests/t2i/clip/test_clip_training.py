"""CLIP learns the same on any number of workers and micro-batches, under ZeRO, and from equal seeds."""

import pytest

from infra.train import turn
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, run_workers
from tests.t2i.clip import tiny

STEPS = {"steps": 6, "save_every_steps": 6}
TASK = f"{tiny.__name__}:task"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return toy.plain(str(tmp_path_factory.mktemp("plain")), tiny.task(), **STEPS)


def alike(found, wanted, most):
    (state, log), (wanted, wanted_log) = found, wanted
    assert len(log) == len(wanted_log) == 6
    for losses, others in zip(log, wanted_log, strict=True):
        assert losses == pytest.approx(others, rel=1e-5)
    assert state.keys() == wanted.keys()
    assert distance(state, wanted, "clip") < most


def test_the_reference_learns(reference):
    _, log = reference
    assert [set(losses) for losses in log] == [{"clip/contrastive"}] * 6
    assert log[-1]["clip/contrastive"] < log[0]["clip/contrastive"]


@pytest.mark.parametrize("micro_steps", [2, 3])
def test_micro_batches_change_nothing(tmp_path, reference, micro_steps):
    """Ten rows by fives, and by fours: the last has two places without a row."""
    alike(toy.plain(str(tmp_path), tiny.task(), micro_steps, **STEPS), reference, 1e-4)


def test_partners_of_a_micro_batch_alone_would_show(tmp_path, reference, monkeypatch):
    """The comparison above means something."""
    monkeypatch.setattr(turn, "acquainted", lambda engine, micro_batches: micro_batches)
    _, log = toy.plain(str(tmp_path), tiny.task(), 2, **STEPS)
    assert abs(log[0]["clip/contrastive"] / reference[1][0]["clip/contrastive"] - 1) > 0.05


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("workers", "ways"), [(1, [(2, 1)]), (2, [(1, 1), (3, 2)])])
def test_zero_trains_like_one_plain_process(tmp_path, reference, workers, ways):
    """Ten rows on two workers by two micro-batches each: one has a place without a row."""
    jobs = [
        {"folder": str(tmp_path / f"{stage}-{steps}"), "stage": stage, "micro_steps": steps, "task": TASK,
         "config": STEPS, "small": True, "recompute": steps == 2}
        for stage, steps in ways
    ]  # fmt: skip
    for job, log in zip(jobs, run_workers(tmp_path, workers, jobs), strict=True):
        alike((final_state(job["folder"]), log), reference, 1e-4)
