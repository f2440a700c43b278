"""Ray Train, ZeRO and the Ray Data feed together compute what one plain process does."""

import time

import pytest
import torch
from safetensors.torch import load_file

from infra import storage
from infra.cluster import Cluster
from infra.metrics import read_scalars
from infra.train import checkpoint, ids
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from tests.infra.train import toy
from tests.infra.train.drive import groups
from tests.infra.train.followers import Greedy
from tests.infra.train.workers import distance, final_state

CONFIG = {"steps": 12, "batch": 10, "log_every_steps": 1, "save_every_steps": 6}


def quiet(*_, **__):
    pass


@pytest.mark.timeout(180)
def test_fit_equals_the_plain_loop_and_is_a_no_op_again(ray_cluster, place, tmp_path):
    toy.write_rows(f"{place}/rows")
    seen = []
    cluster = Cluster(name="two", workers=(2, 2), zero_stage=2, micro_batch=3, log_ids=True)
    training = Training(toy.Toy(), [f"{place}/rows"], TrainConfig(**CONFIG), f"{place}/out")
    arguments = ([training], cluster)
    result = fit(*arguments, lambda done, total, unit, **figures: seen.append((done, total, unit)))
    _, losses = toy.plain(str(tmp_path / "plain"))
    assert [row["net/token"] for row in read_scalars(f"{place}/out")] == pytest.approx(losses, rel=1e-4)
    assert result["rows"] == toy.ROWS
    assert result["step"] == 12
    shards = ["000000", "000001"]
    each = ids.row_ids(training.inputs, shards, training.task)
    used = ids.read_ids(f"{place}/out/ids")
    assert len(used) == 12
    assert ids.check(used, training.plan({name: len(one) for name, one in zip(shards, each, strict=True)}), each) == 2
    assert all(total == 12 and unit == "steps" for _, total, unit in seen)
    saved = final_state(f"{place}/out/checkpoints")
    with storage.fetched(f"{place}/out/model") as local:
        exported = load_file(f"{local}/net.safetensors")
    assert torch.equal(exported["hidden.weight"], saved["net/ema/hidden.weight"])
    assert not torch.equal(exported["hidden.weight"], saved["net/w/hidden.weight"])
    started = time.monotonic()
    assert fit(*arguments, quiet) == result
    assert time.monotonic() - started < 2


@pytest.mark.timeout(180)
def test_what_does_not_fit_is_trained_in_halves_to_the_same_numbers(ray_cluster, tmp_path, capsys):
    toy.write_rows(f"{tmp_path}/rows")
    training = Training(Greedy(most=2), [f"{tmp_path}/rows"], TrainConfig(**CONFIG), f"{tmp_path}/out")
    cluster = Cluster(name="two", workers=(2, 2), zero_stage=2, restarts=0)
    fit([training], cluster, quiet)
    wanted, losses = toy.plain(str(tmp_path / "plain"))
    assert [row["net/token"] for row in read_scalars(f"{tmp_path}/out")] == pytest.approx(losses, rel=1e-4)
    assert distance(final_state(training.checkpoints), wanted) < 1e-5
    assert len(groups(tmp_path, "begins")) == 2
    said = capsys.readouterr().err
    assert "5 rows at once do not fit into a worker's memory (CUDA out of memory). From now on 2 are taken" in said


@pytest.mark.timeout(60)
def test_no_usable_row_is_said_before_anything_starts(ray_cluster, tmp_path):
    class Picky(toy.Toy):
        def where(self, columns):
            return columns["row"] < 0

    toy.write_rows(f"{tmp_path}/rows")
    training = Training(Picky(), [f"{tmp_path}/rows"], TrainConfig(**CONFIG), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="No row is left"):
        fit([training], Cluster(name="one"), quiet)


@pytest.mark.timeout(180)
def test_what_diverges_is_named_with_its_rows_and_not_tried_again(ray_cluster, tmp_path):
    toy.write_rows(f"{tmp_path}/rows")
    training = Training(
        toy.Sick(), [f"{tmp_path}/rows"], TrainConfig(**CONFIG | {"save_every_steps": 1}), f"{tmp_path}/out"
    )
    with pytest.raises(RuntimeError, match=r"is no finite number at step (\d+)") as raised:
        fit([training], Cluster(name="two", workers=(2, 2)), quiet)
    told = storage.read_json(f"{tmp_path}/out/diverged.json")
    assert f"{7:016x}" in told["sample_ids"]
    assert len(told["sample_ids"]) == CONFIG["batch"]
    assert "diverged.json" in str(raised.value)
    saved = checkpoint.newest(training.checkpoints)
    assert (checkpoint.step_of(saved) if saved else 0) == told["step"] - 1, "the last good step counts"
    assert len(groups(tmp_path, "begins")) == 1
