"""Losses that mix rows are those of the global batch, however it is shared out over workers and micro-batches."""

from dataclasses import replace

import pytest
import torch

from infra.train import checkpoint, world
from infra.train.engine import PlainEngine
from infra.train.loop import TrainConfig
from tests.captioner import worker
from tests.infra.train.workers import run_workers


def distance(a, b, kind="w"):
    """Norm of the difference over norm, whole model, but for keys' biases.

    The softmax does not see those: their gradient is rounding alone, and Adam makes steps of full size of it.
    """
    names = [name for name in a if name.startswith(f"base/{kind}/") and not name.endswith(("key.bias", "qkv.bias"))]
    flat = [torch.cat([state[name].flatten() for name in names]) for state in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return worker.plain(str(tmp_path_factory.mktemp("plain")))


def test_the_reference_learns_all_three(reference):
    _, log = reference
    assert len(log) == 5
    assert all(all(value > 0 for value in figures) for figures in log)


@pytest.mark.parametrize("micro_steps", [2, 3, 10])
def test_micro_batches_change_nothing(tmp_path, reference, micro_steps):
    state, log = worker.plain(str(tmp_path), micro_steps)
    for found, wanted in zip(log, reference[1], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert distance(state, reference[0]) < 1e-5
    assert distance(state, reference[0], "exp_avg") < 1e-4


@pytest.mark.parametrize(("workers", "micro_steps"), [(1, 1), (2, 1), (3, 1), (3, 2), (2, 2)])
@pytest.mark.parametrize("part", ["contrastive", "match"])
def test_gradients_of_workers_add_up(workers, micro_steps, part):
    """Each worker on its own rows with its own gather, one after another in this process; their gradients summed.

    Two workers with two micro-batches each have places without a row in the middle of the order.
    """
    config = TrainConfig(**worker.STEPS)
    (alone,) = worker.task().updates()
    (whole,) = next(worker.feed(worker.task(), config, 0, 1, 1)(2))
    wanted_loss = alone.module(whole)[part]
    wanted_loss.backward()
    (update,) = worker.task().updates()
    shares = [next(worker.feed(worker.task(), config, rank, workers, micro_steps)(2)) for rank in range(workers)]
    with torch.no_grad():
        shown = [update.module({**batch, "survey": torch.tensor(1)}) for share in shares for batch in share]
    columns = world.rows(*shown)
    assert len(columns["weight"]) == config.batch
    total = 0.0
    for batch, first in zip([batch for share in shares for batch in share], columns.pop("first"), strict=True):
        if micro_steps == 1:
            update.module.matching.gather = lambda own, first=first: {**columns, "first": first}
            loss = update.module(batch)[part]
        else:
            seen = {f"all_{name}": column for name, column in columns.items()}
            loss = update.module({**batch, **seen, "all_first": first})[part]
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
    grads = dict(alone.module.named_parameters())
    compared = 0
    for name, parameter in update.module.named_parameters():
        if grads[name].grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-3, atol=1e-5, msg=name)
            compared += bool(parameter.grad.abs().max() > 1e-4)
    assert compared > 20


def test_a_gather_per_worker_alone_would_show(reference):
    """The comparison above means something: negatives from a worker's own rows alone are another loss."""
    config = TrainConfig(**worker.STEPS)
    (update,) = worker.task().updates()
    (whole,) = next(worker.feed(worker.task(), config, 0, 1, 1)(2))
    halves = [next(worker.feed(worker.task(), config, rank, 2, 1)(2))[0] for rank in range(2)]
    with torch.no_grad():
        alone = sum(float(update.module(half)["contrastive"]) for half in halves)
        assert abs(alone / float(update.module(whole)["contrastive"]) - 1) > 0.05


def test_alone_rows_are_gathered_as_they_are():
    columns = {"a": torch.rand(3, 2, requires_grad=True), "b": torch.arange(3)}
    gathered = world.rows(columns)
    assert int(gathered.pop("first")) == 0
    assert all(torch.equal(gathered[name], column) for name, column in columns.items())
    assert not gathered["a"].requires_grad


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("stage", "workers", "micro_steps"), [(1, 3, 1), (3, 2, 2)])
def test_zero_matches_like_one_plain_process(tmp_path, reference, stage, workers, micro_steps):
    folder = str(tmp_path / "run")
    job = {"folder": folder, "stage": stage, "micro_steps": micro_steps}
    (log,) = run_workers(tmp_path, workers, [job], seconds=380, work=worker.work)
    for found, wanted in zip(log, reference[1], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    newest = checkpoint.newest(folder)
    assert newest is not None
    saved = checkpoint.Checkpoint(newest)
    state = {name: saved[name] for name in saved.names}
    assert distance(state, reference[0]) < 1e-5
    assert distance(state, reference[0], "exp_avg") < 1e-4
    assert state.keys() == reference[0].keys()


def test_a_task_starts_from_a_captioner_that_never_matched(tmp_path):
    plain = worker.task(contrastive=0, match=0)
    (update,) = plain.updates()
    assert not update.mixes_rows
    assert update.module.matching is None
    assert "draw_text" not in plain.collate(worker.rows(), lambda salt: None)
    plain.export({"base": update.module}, str(tmp_path))
    (update,) = replace(worker.task(contrastive=0), source=str(tmp_path)).updates()
    assert update.module.matching.config.losses == ("match",)
    engine = PlainEngine(update)
    (batch,) = next(worker.feed(worker.task(contrastive=0), TrainConfig(**worker.STEPS), 0, 1, 1)(0))
    assert set(engine(batch)) == {"alt", "match"}
    worker.task().export({"base": update.module}, str(tmp_path))
    (frozen,) = replace(plain, source=str(tmp_path)).updates()
    assert not any(parameter.requires_grad for parameter in frozen.module.matching.parameters())
    assert set(frozen.module(batch | {"draw_text": batch["draw_text"]})) >= {"alt"}
