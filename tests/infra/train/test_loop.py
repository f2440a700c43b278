"""The loop leaves when it is told, keeps nothing of a step that diverged, and says how long it waited for data."""

import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from infra.train import checkpoint
from infra.train.engine import PlainEngine
from infra.train.loop import Diverged, DoesNotFitError, Left, TrainConfig, train
from infra.train.worker import _export as export
from infra.train.writer import Writer
from tests.infra.train import toy

CONFIG = TrainConfig(steps=12, batch=10, log_every_steps=1, save_every_steps=5)


class Told:
    """A watch that says to leave from some call on."""

    def __init__(self, calls=10**9):
        self.calls, self.seen = calls, []

    def begin(self, step):
        pass

    def uses(self, step, micro_batches):
        pass

    def at(self, phase, *, step):
        self.seen.append((phase, step))

    def leaving(self):
        self.calls -= 1
        return self.calls < 0


class Poisoned(toy.Net):
    """A loss that is not a number, or too much of one, from some step on."""

    def __init__(self, step, value):
        super().__init__()
        self.step, self.value = step, value

    def forward(self, batch):
        losses = super().forward(batch)
        return {"token": losses["token"] * self.value if batch["step"] >= self.step else losses["token"]}


class Sick(toy.Toy):
    def __init__(self, step, value):
        super().__init__()
        object.__setattr__(self, "poison", (step, value))

    def updates(self):
        (update,) = super().updates()
        sick = Poisoned(*self.poison)
        sick.load_state_dict(update.module.state_dict())
        update.module = sick
        return [update]


def run(folder, task=None, config=CONFIG, watch=None, feed=None):
    arguments = (
        task or toy.Toy(),
        feed or toy.feed(config, 0, 1, 1),
        PlainEngine,
        1,
        config,
        str(folder),
        toy.Figure(),
    )
    return train(*arguments, *([watch] if watch else []))


@pytest.mark.parametrize("steps", [1, 3, 5, 7, 11])
def test_a_run_that_leaves_has_saved_all_and_ends_bit_equal(tmp_path, steps):
    whole = toy.final_state(run(tmp_path / "whole"))
    with pytest.raises(Left):
        run(tmp_path / "cut", watch=Told(steps))
    saved = checkpoint.newest(str(tmp_path / "cut"))
    assert saved
    assert checkpoint.step_of(saved) == steps
    state = toy.final_state(run(tmp_path / "cut"))
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_what_has_exploded_is_not_saved_by_who_leaves(tmp_path):
    config = TrainConfig(steps=12, batch=10, log_every_steps=10, save_every_steps=10)
    with pytest.raises(Diverged, match="beyond 1e") as raised:
        run(tmp_path, Sick(3, 1e9), config, Told(6))
    assert raised.value.step == 6
    assert checkpoint.newest(str(tmp_path)) is None


def test_a_loss_scale_that_cannot_help_is_a_divergence_and_saves_under_way_count(tmp_path):
    class Broken(PlainEngine):
        def step(self, lr):
            if self._optimizer.state and next(iter(self._optimizer.state.values()))["step"] >= 7:
                raise FloatingPointError("The gradient is no finite number even with a loss scale of 1.")
            return super().step(lr)

    with pytest.raises(Diverged, match="'net' at step 8: The gradient is no finite number even") as raised:
        train(toy.Toy(), toy.feed(CONFIG, 0, 1, 1), Broken, 1, CONFIG, str(tmp_path), toy.Figure())
    assert raised.value.step == 8
    assert checkpoint.steps(str(tmp_path)) == [5]


def test_one_share_of_the_state_is_held_at_a_time(tmp_path, monkeypatch):
    seen, save = [], Writer._save

    class Recorded(PlainEngine):
        def state(self):
            seen.append("copied")
            return super().state()

    def slow(*arguments):
        time.sleep(0.2)
        save(*arguments)
        seen.append("saved")

    monkeypatch.setattr(Writer, "_save", slow)
    config = TrainConfig(steps=3, batch=10, save_every_steps=1)
    train(toy.Toy(), toy.feed(config, 0, 1, 1), Recorded, 1, config, str(tmp_path), toy.Figure())
    assert seen == ["copied", "saved"] * 3


def test_who_leaves_before_a_step_saves_nothing(tmp_path):
    with pytest.raises(Left):
        run(tmp_path, watch=Told(0))
    assert checkpoint.newest(str(tmp_path)) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), None])
def test_what_does_not_fit_is_told_with_the_rows_taken_at_once(tmp_path, error):
    class Large(Sick):
        def updates(self):
            (update,) = super().updates()

            def forward(batch):
                if error is None:
                    torch.empty(2**60)  # as torch says it of the machine's own memory
                raise error

            update.module.forward = forward
            return [update]

    with pytest.raises(DoesNotFitError, match="10 rows at once do not fit into a worker's memory") as raised:
        run(tmp_path, Large(0, 1.0))
    assert raised.value.rows == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("log_every_steps", [1, 4])
def test_what_diverges_is_never_saved(tmp_path, value, log_every_steps):
    config = TrainConfig(steps=12, batch=10, log_every_steps=log_every_steps, save_every_steps=5)
    with pytest.raises(Diverged, match="step") as raised:
        run(tmp_path, Sick(7, value), config)
    assert 8 <= raised.value.step <= 10
    if value != 1e9:
        assert raised.value.step == 8, "a gradient that is no number is seen at once"
    saved = checkpoint.newest(str(tmp_path))
    assert saved
    assert checkpoint.step_of(saved) == 5
    assert all(tensor.isfinite().all() for tensor in toy.final_state(checkpoint.Checkpoint(saved)).values())


def test_the_watch_sees_each_phase(tmp_path):
    watch = Told()
    run(tmp_path, watch=watch)
    expected = []
    for step in range(12):
        expected += [("data", step), ("step", step)]
        expected += [("save", step + 1)] if step + 1 in (5, 10, 12) else []
    assert watch.seen == expected, "the last save is waited for as a save, which may take longer than a step"


def test_who_is_told_to_leave_is_saving_until_the_save_has_ended(tmp_path):
    watch = Told(3)
    with pytest.raises(Left):
        run(tmp_path, watch=watch)
    assert watch.seen[-1][0] == "save"


def test_the_share_of_time_spent_waiting(tmp_path):
    def slow(start):
        for batches in toy.feed(CONFIG, 0, 1, 1)(start):
            time.sleep(0.05)
            yield batches

    shares = []
    for feed in (toy.feed(CONFIG, 0, 1, 1), slow):
        log = toy.Figure("waiting_share")
        train(toy.Slow(), feed, PlainEngine, 1, CONFIG, str(tmp_path / str(len(shares))), log)
        assert all(0 <= share <= 1 for share in log)
        shares.append(sorted(log)[len(log) // 2])
    assert shares[0] + 0.2 < shares[1]


def test_a_checkpoint_is_scored_by_the_mean_loss_since_the_one_before(tmp_path):
    losses = toy.Figure()
    train(toy.Toy(), toy.feed(CONFIG, 0, 1, 1), PlainEngine, 1, CONFIG, str(tmp_path), losses)
    ends = [0, 5, 10, 12]
    scores = {stop: sum(losses[start:stop]) / (stop - start) for start, stop in pairwise(ends)}
    kept = checkpoint.steps(str(tmp_path))
    assert kept
    for step in kept:
        record = checkpoint.read_commit(checkpoint.place(str(tmp_path), step))
        assert record["score"] == pytest.approx(scores[step], rel=1e-5)
    best = checkpoint.best(str(tmp_path))
    assert best
    assert checkpoint.step_of(best) == min(scores, key=lambda step: scores[step])


class Held(dict):
    """Tensors of a checkpoint."""

    meta = {}


@pytest.mark.parametrize("averaged", [True, False])
def test_what_is_exported_is_the_average_where_there_is_one_and_else_what_was_saved(tmp_path, averaged):
    state = toy.final_state(run(tmp_path / "run"))
    held = Held(
        {name: tensor + 1 for name, tensor in state.items() if averaged or "/ema/" not in name}
    )  # no first ones
    export(toy.Toy(), held, str(tmp_path / "model"))
    found = load_file(tmp_path / "model" / "net.safetensors")
    assert torch.equal(found.pop("head.weight"), found["embed.weight"])  # tied
    frozen, buffers = {"frozen.weight", "frozen.bias"}, {"scale", "calls"}
    assert found.keys() > frozen | buffers
    for name, tensor in found.items():
        kind = "b" if name in buffers else "ema" if averaged and name not in frozen else "w"
        assert torch.equal(tensor, held[f"net/{kind}/{name}"]), name
    assert averaged == (not torch.equal(found["hidden.weight"], held["net/w/hidden.weight"]))


def test_a_feed_may_tell_how_much_lies_ready(tmp_path):
    class Feed:
        left = 12
        make = staticmethod(toy.feed(CONFIG, 0, 1, 1))

        def __call__(self, start):
            for batches in self.make(start):
                self.left -= 1
                yield batches

        def prepared(self):
            return self.left

    log = toy.Figure("prepared_steps")
    train(toy.Toy(), Feed(), PlainEngine, 1, CONFIG, str(tmp_path), log)
    assert log == [*range(11, -1, -1)]
