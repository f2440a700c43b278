"""What is held out is measured beside a training: the right rows, the right weights, once a checkpoint, in peace."""

import io
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from infra import storage
from infra.cluster import Cluster
from infra.data.ledger import Ledger, commit, counting
from infra.metrics import read_scalars
from infra.train import checkpoint, held_out, onlooker
from infra.train.draw import uniforms
from infra.train.engine import load_weights
from infra.train.fit import fit
from infra.train.held_out import HeldOut, NoRoomError, Seen
from infra.train.loop import TrainConfig
from infra.train.onlooker import Onlooker
from infra.train.optim import OptimConfig
from infra.train.task import Painter, Update
from infra.train.worker import FINISHED, Training
from tests.infra.train import toy
from tests.infra.train.test_fit import quiet
from tests.infra.train.workers import final_state

ROWS = 60  # in two shards; every third is held out, and of these the even ones are wanted
CONFIG = {"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 5}


@dataclass(frozen=True)
class Split(toy.Toy):
    """The toy on the rows of a split that are even."""

    where_reads: tuple[str, ...] = ("row", "split")

    def where(self, columns):
        return (columns["split"] == "train") & (columns["row"] % 2 == 0)

    def collate(self, rows, draw):
        return super().collate(rows, draw) | {"drawn": draw("x"), "row": np.array(rows["row"])}


def write_rows(folder, bucket=None):
    """Sample ids fall as rows rise, so that the first by id are the last of the last shard."""
    ledger = Ledger(folder)
    for shard in range(2):
        rows = list(range(shard * ROWS // 2, (shard + 1) * ROWS // 2))
        columns = {
            "sample_id": [f"{ROWS - row:016x}" for row in rows],
            "state": ["accepted"] * len(rows),
            "reason": pa.nulls(len(rows), pa.string()),
            "row": rows,
            "split": ["train" if row % 3 else "test" for row in rows],
            "bucket": ["wide" if row % 4 else "tall" for row in rows],
        }
        table = counting(pa.table(columns), ["split"], first=["split"])
        ledger.add(f"{shard:06d}", commit(folder, f"{shard:06d}", table))
    ledger.close()


def trained(place):
    """A training, in this process; checkpoints 10 and 12 are kept."""
    write_rows(f"{place}/rows")
    made = Training(Split(), [f"{place}/rows"], TrainConfig(**CONFIG), f"{place}/out")
    toy.plain(made.checkpoints, made.task, save_every_steps=5)
    return made


@pytest.fixture
def training(tmp_path):
    return trained(tmp_path)


def wanted(count):
    """Row numbers of the first held-out rows by sample id."""
    return [row for row in range(ROWS - 1, -1, -1) if row % 6 == 0][:count]


def by_hand(training, step, rows):
    """The mean loss of the averaged weights over the tokens of some rows."""
    (update,) = training.task.updates()
    load_weights(update, checkpoint.Checkpoint(checkpoint.place(training.checkpoints, step)), "ema")
    ids = torch.from_numpy(toy.Toy().collate({"row": rows}, None)["ids"])
    batch = {"ids": ids, "weight": torch.ones(len(rows))}
    with torch.no_grad():
        module = update.module.eval()
        return float(module(batch)["token"] / module.targets(batch)["token"])


def look(seen, step):
    seen.look(step, time.process_time())
    return read_scalars(held_out.folder_of(seen.training))


@pytest.mark.parametrize("count", [7, 512])
def test_the_loss_is_that_of_the_average_on_the_first_held_out_rows(training, count):
    seen = Seen(training, count)
    assert len(seen.rows) == min(count, ROWS // 6)
    (row,) = look(seen, 12)
    assert row["step"] == 12
    assert row["net/token"] == pytest.approx(by_hand(training, 12, wanted(count)), rel=1e-5)
    assert row[held_out.COST] > 0
    assert row["net/token"] != pytest.approx(by_hand(training, 12, [1, 2, 3]), rel=1e-3)
    assert [each["step"] for each in look(seen, 10)] == [12, 10]
    told = held_out.summary([training])
    assert told.keys() == {"net/token", "cpu_seconds"}
    seen.close()


def test_another_process_goes_on_where_one_ended(training):
    look(Seen(training, 9), 10)
    rows = look(Seen(training, 9), 12)
    assert [row["step"] for row in rows] == [10, 12]
    assert held_out.last_step(training) == 12


@pytest.mark.parametrize(("batch", "at_once"), [(10, 16), (4, 16), (64, 3), (1, 1)])
def test_how_rows_are_cut_changes_nothing(tmp_path, monkeypatch, batch, at_once):
    monkeypatch.setattr(held_out, "ROWS_AT_ONCE", at_once)
    write_rows(f"{tmp_path}/rows")
    config = TrainConfig(**CONFIG | {"batch": batch, "seed": 5})
    rows = HeldOut(Training(Split(), [f"{tmp_path}/rows"], config, f"{tmp_path}/out"), 8)
    batches = [each for several in rows.batches(batch) for each in several]
    there = [each["weight"] > 0 for each in batches]
    numbers, drawn, ids = (
        torch.cat([each[name][some] for each, some in zip(batches, there, strict=True)])
        for name in ("row", "drawn", "id")
    )
    assert numbers.tolist() == wanted(8)
    assert ids.tolist() == [ROWS - row for row in wanted(8)]
    assert drawn.tolist() == uniforms(5, np.zeros(8), ids.numpy().astype(np.uint64), "x").tolist()
    (update,) = Split().updates()
    losses = held_out.losses(replace(update, module=update.module.eval()), rows.batches(batch), 3)
    monkeypatch.setattr(held_out, "ROWS_AT_ONCE", 100)
    ((whole,),) = rows.batches(100)
    expected = (update.module(whole)["token"] / update.module.targets(whole)["token"]).detach()
    assert losses == {"net/token": pytest.approx(float(expected), rel=1e-5)}


def test_a_batch_has_rows_of_one_bucket(tmp_path):
    write_rows(f"{tmp_path}/rows")
    training = Training(Split(bucket="bucket"), [f"{tmp_path}/rows"], TrainConfig(**CONFIG), f"{tmp_path}/out")
    told = [
        {bool(row % 4) for row in each["row"].tolist()}
        for several in HeldOut(training, 9).batches(10)
        for each in several
    ]
    assert all(len(each) == 1 for each in told)
    assert len(told) == 2


def test_shards_without_first_rows_are_not_read(tmp_path, monkeypatch):
    write_rows(f"{tmp_path}/rows")
    training = Training(Split(), [f"{tmp_path}/rows"], TrainConfig(**CONFIG), f"{tmp_path}/out")
    opened, read = [], HeldOut._read
    monkeypatch.setattr("infra.data.first.AT_ONCE", 1)
    monkeypatch.setattr(HeldOut, "_read", lambda self, shard: opened.append(shard) or read(self, shard))
    assert len(HeldOut(training, 5)) == 5
    assert opened == ["000001"]


class Meeting(nn.Module):
    """A loss that depends on the mean of all rows of the global batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def targets(self, batch):
        return {"apart": batch["weight"].sum()}

    def forward(self, batch):
        shown = {"row": batch["row"].float(), "weight": batch["weight"]}
        if "survey" in batch:
            return shown
        all_ = batch.get("all_row", shown["row"][batch["weight"] > 0])
        return {"apart": (((shown["row"] - all_.mean()) ** 2) * batch["weight"]).sum() * self.weight[0]}


def test_rows_that_see_each_other_see_as_many_as_in_training(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "ROWS_AT_ONCE", 2)
    write_rows(f"{tmp_path}/rows")
    config = TrainConfig(**CONFIG | {"batch": 5})
    rows = HeldOut(Training(Split(), [f"{tmp_path}/rows"], config, f"{tmp_path}/out"), 10)
    update = Update("meet", Meeting(), OptimConfig(), mixes_rows=True)
    numbers = np.array(wanted(10), float).reshape(2, 5)
    assert held_out.losses(update, rows.batches(5), 1) == {"meet/apart": pytest.approx(numbers.var(axis=1).mean())}


@dataclass(frozen=True)
class Painted(Split):
    """Draws a grey picture of each row, as bright as its number."""

    paints: int = 3

    def asks(self, rows, draw):
        return {"prompt": np.array([f"row {row}" for row in rows["row"]], object), "row": np.array(rows["row"])}

    def paint(self, modules, batch):
        assert not modules["net"].training
        return [np.full((4, 6, 3), row, np.uint8) for row in batch["row"].tolist()]


def test_pictures_are_drawn_of_the_same_rows_each_time_wherever_they_go(place):
    training = trained(place)
    painted = replace(training, task=Painted())
    assert isinstance(painted.task, Painter)
    assert not isinstance(training.task, Painter)
    seen = Seen(painted, 9)
    for step in (10, 12):
        look(seen, step)
        strip = Image.open(io.BytesIO(storage.read_bytes(f"{painted.out}/held_out/pictures/{step:09d}.png")))
        assert np.asarray(strip)[0, ::6, 0].tolist() == wanted(3)
    assert storage.read_json(f"{painted.out}/held_out/prompts.json") == [f"row {row}" for row in wanted(3)]
    seen.close()
    with storage.fetched(f"{painted.out}/held_out/tensorboard") as local:
        assert images(local) == {f"pictures/{n} row {row}": [10, 12] for n, row in enumerate(wanted(3), 1)}


def images(folder):
    """Steps of each picture that TensorBoard finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_what_is_gone_or_too_large_is_not_looked_at(training, monkeypatch):
    seen = Seen(training, 9)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        seen.look(5, 0.0)  # it was kept no longer
    monkeypatch.setattr(held_out, "MEMORY_SHARE", 1e-9)
    with pytest.raises(NoRoomError, match="too large"):
        seen.look(12, 0.0)
    assert held_out.summary([training]) == {}


class Near(Onlooker):
    """Whose actor is in this process."""

    eye: onlooker.Eye

    def _opened(self):
        if self._eye is None:
            eye = onlooker.Eye.__new__(onlooker.Eye)
            eye._trainings, eye._count, eye._since, eye._seen = self._trainings, self._count, 0.0, None
            self._eye = type("Handle", (), {"look": Remote(eye.look), "close": Remote(eye.close)})
        return self._eye

    def _ask(self, answer):
        return answer()


class Remote:
    def __init__(self, function):
        self._function = function

    def remote(self, *arguments):
        return lambda: self._function(*arguments)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("ray.kill", lambda actor: None)
    for name in ("FIRST_SECONDS", "EVERY_SECONDS", "SHARE"):
        monkeypatch.setattr(onlooker, name, 0)
    monkeypatch.setattr(onlooker, "LOOK_SECONDS", 0.01)


def steps(training):
    return [row["step"] for row in read_scalars(held_out.folder_of(training))]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def local(tmp_path):
    """A training whose last checkpoint is torn, and that is not finished."""
    made = trained(tmp_path)
    os.rename(f"{made.checkpoints}/000000012/commit.json", f"{tmp_path}/commit.json")
    return made


def test_a_checkpoint_counts_once_it_is_whole_and_once(local, tmp_path, quick):
    with Near([local], 9) as beside:
        time.sleep(0.1)
        assert steps(local) == []  # no step was made yet
        beside.begin()
        until(lambda: steps(local) == [10])
        time.sleep(0.1)
        os.rename(f"{tmp_path}/commit.json", f"{local.checkpoints}/000000012/commit.json")
        storage.write_json(f"{local.out}/{FINISHED}", {})
    assert steps(local) == [10, 12]  # the end waits for the last
    with Near([local], 9) as beside:
        beside.begin()
    assert steps(local) == [10, 12]


def test_a_training_that_ends_soon_is_not_looked_at(local, quick, monkeypatch):
    monkeypatch.setattr(onlooker, "FIRST_SECONDS", 100)
    with Near([local], 9) as beside:
        beside.begin()
        time.sleep(0.1)
        storage.write_json(f"{local.out}/{FINISHED}", {})
    assert steps(local) == []
    assert beside._eye is None


@pytest.mark.parametrize(("task", "count"), [(Split(), 0), (toy.Toy(), 9)])
def test_nobody_looks_where_nothing_is_held_out(local, quick, task, count):
    with Near([replace(local, task=task)], count) as beside:
        beside.begin()
        time.sleep(0.1)
        assert not beside._thread.is_alive()
    assert steps(local) == []


def test_what_goes_wrong_is_said_once_and_only_there(local, quick, capsys):
    bad = replace(local, task=Broken(), out=f"{local.out}/bad")
    os.makedirs(bad.out)
    os.symlink(local.checkpoints, bad.checkpoints)
    with Near([bad, local], 9) as beside:
        beside.begin()
        time.sleep(0.2)
        assert steps(bad) == []
        storage.write_json(f"{bad.out}/{FINISHED}", {})
        until(lambda: steps(local) == [10])
    said = capsys.readouterr().err
    assert said.count("Nobody looks") == said.count("It broke.") == 1


class Broken(Split):
    def updates(self):
        raise ValueError("It broke.")


def test_an_end_by_an_error_waits_for_nothing(local, quick, monkeypatch):
    monkeypatch.setattr(Near, "_ask", lambda self, answer: time.sleep(30))
    began, beside = time.monotonic(), Near([local], 9)
    beside.__enter__()
    beside.begin()
    until(lambda: beside._eye)
    beside.__exit__(KeyError)
    assert time.monotonic() - began < 5


@dataclass(frozen=True)
class SlowSplit(Split):
    """The same numbers, later: an actor has the time to start."""

    def updates(self):
        (update,) = super().updates()
        slow = toy.SlowNet()
        slow.load_state_dict(update.module.state_dict())
        return [replace(update, module=slow)]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_training_is_the_same_to_the_bit_whether_somebody_looks_on_or_not(ray_cluster, tmp_path, monkeypatch):
    for name in ("FIRST_SECONDS", "EVERY_SECONDS", "SHARE"):
        monkeypatch.setattr(onlooker, name, 0)
    monkeypatch.setattr(onlooker, "LOOK_SECONDS", 0.1)
    write_rows(f"{tmp_path}/rows")
    config = TrainConfig(**CONFIG | {"steps": 60})
    seen, alone = (
        Training(SlowSplit(), [f"{tmp_path}/rows"], config, f"{tmp_path}/{name}") for name in ("seen", "alone")
    )
    told = fit([seen], Cluster(name="one", held_out=9), quiet)
    plain = fit([alone], Cluster(name="one", held_out=0), quiet)
    states = [final_state(training.checkpoints) for training in (seen, alone)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    losses = [[row["net/token"] for row in read_scalars(training.out)] for training in (seen, alone)]
    assert losses[0] == losses[1]
    assert steps(seen)[-1] == 60
    assert steps(seen) == sorted(set(steps(seen)))
    assert read_scalars(held_out.folder_of(seen))[-1]["net/token"] == pytest.approx(
        by_hand(seen, 60, wanted(9)), rel=1e-5
    )
    assert told["held_out"].keys() == {"net/token", "cpu_seconds"}
    assert told["held_out"]["cpu_seconds"] > 1  # the start of a process counts, too
    assert "held_out" not in plain
    assert not storage.exists(held_out.folder_of(alone))
    assert fit([seen], Cluster(name="one"), quiet) == told
    until(lambda: not eyes())


def eyes():
    """The actors that look on, and live."""
    from ray._private.state import actors

    return [each for each in actors().values() if each["ActorClassName"] == "Eye" and each["State"] != "DEAD"]
