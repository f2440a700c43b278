"""Targets of a step, what follows a step, bases that are built anew and rows that see each other: on any workers."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from infra.cluster import Cluster
from infra.train import checkpoint, fit, world
from infra.train.engine import PlainEngine, load_weights
from infra.train.fit import Training
from infra.train.loop import TrainConfig
from infra.train.worker import _export as export
from tests.infra.train import followers, toy
from tests.infra.train.workers import distance, final_state, newest, run_workers

PLACE = "tests.infra.train.followers:"
CUT = {"save_every_steps": 5}  # of twelve steps: who is cut before the last save goes on after ten
STAGES = {"Scheduled": (0, 2, 3), "Follows": (0, 1, 2, 3), "Averages": (0, 1, 2), "Based": (0, 1, 2, 3),
          "Meets": (0, 2, 3)}  # fmt: skip


def plain(place, name, micro_steps=1, **options):
    """Train in this process."""
    return toy.plain(str(place / f"{name}-{micro_steps}"), getattr(followers, name)(), micro_steps, **options)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    return {name: plain(place, name) for name in STAGES}


def alike(found, wanted):
    """Losses, weights, moments and buffers."""
    (state, losses), (wanted_state, wanted_losses) = found, wanted
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert state.keys() == wanted_state.keys()
    assert distance(state, wanted_state) < 1e-5
    for name in state.keys() - {"net/b/calls"}:  # micro-steps are calls, too
        torch.testing.assert_close(state[name].float(), wanted_state[name].float(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("micro_steps", [2, 3])
@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_change_nothing(tmp_path, references, name, micro_steps):
    alike(plain(tmp_path, name, micro_steps), references[name])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [1, 2])
def test_workers_train_like_one_plain_process_and_cut_ones_go_on_bit_equal(tmp_path, references, size):
    """With micro-batches and recomputed blocks, and without; what is cut has saved after ten steps."""
    jobs = []
    for name, stages in STAGES.items():
        for stage in stages:
            turn = (stage + size) % 2
            job = {
                "task": PLACE + name,
                "stage": stage,
                "micro_steps": 1 + turn,
                "recompute": bool(turn),
                "small": True,
            }
            whole = {**job, "folder": str(tmp_path / f"{name}-{stage}")}
            cut = {**job, "folder": str(tmp_path / f"{name}-{stage}-cut"), "config": CUT}
            jobs += [whole, cut, {**cut, "do": "tear"}, cut]
    results = run_workers(tmp_path, size, jobs)
    for number in range(0, len(jobs), 4):
        job, (losses, before, _, after) = jobs[number], results[number : number + 4]
        name = job["task"].removeprefix(PLACE)
        state = final_state(job["folder"])
        alike((state, losses), references[name])
        assert before == losses
        assert after == losses[10:]
        cut = final_state(f"{job['folder']}-cut")
        assert all(torch.equal(cut[key], state[key]) for key in state), job
        assert cut.keys() == state.keys()


def test_targets_depend_on_the_step(references):
    """The count by which a loss is divided is that of the step's places, a third of which are left out."""
    task = followers.Scheduled()
    (update,) = task.updates()
    engine = PlainEngine(update)
    steps = toy.feed(TrainConfig(steps=2, batch=10), 0, 1, 1, task)(0)
    for step, (batch,) in zip(range(2), steps, strict=True):
        count = sum(
            (place + int(ids[0])) % 3 != step and int(ids[place + 1]) > 0 for ids in batch["ids"] for place in range(6)
        )
        batch["step"] = torch.tensor(step)
        assert update.module.targets(batch)["token"] == count
        loss = engine(batch)["token"] / count
        assert float(loss.detach()) == pytest.approx(references["Scheduled"][1][step], rel=1e-5)
        engine.backward(loss)
        engine.step(1e-2 * (step + 1) / 3)


def test_what_follows_has_seen_every_row_of_each_step_once(references):
    state, _ = references["Follows"]
    assert state["net/b/followed"] == 12
    assert state["net/b/rows"] == 120
    assert (state["net/b/books.0.counts"] > 0).sum() > 1, "one code alone would show nothing"
    # The counts of places: each step adds a fifth of all it has seen, seven a row.
    assert state["net/b/books.0.counts"].sum() == pytest.approx(70 + (8 - 70) * 0.8**12, rel=1e-5)


def test_an_average_is_of_the_weights_after_each_step(tmp_path):
    """Against the weights that checkpoints of every step hold."""
    task, folder = followers.Averages(), str(tmp_path)
    config = {"steps": 3, "save_every_steps": 1}
    (update,) = task.updates()
    name, mean = "blocks.0.0.weight", update.module.teacher[0][0].weight.clone()
    for step in range(1, 4):
        state, _ = toy.plain(folder, task, **config | {"steps": step})
        mean.lerp_(state[f"net/w/{name}"], 0.2)
        torch.testing.assert_close(state[f"net/w/teacher.{name.removeprefix('blocks.')}"], mean)


@pytest.mark.timeout(120)
def test_nothing_follows_a_step_that_was_not_taken(tmp_path):
    jobs = [
        {"folder": str(tmp_path / f"{stage}"), "stage": stage, "task": f"{PLACE}Skips", "micro_steps": 1 + stage % 2,
         "config": {"precision": "fp16"}}
        for stage in (0, 1, 2, 3)
    ]  # fmt: skip
    run_workers(tmp_path, 2, jobs)
    for job in jobs:
        state, taken = final_state(job["folder"]), newest(job["folder"]).meta["updates"]["net"]["optimizer_step"]
        assert 0 < taken < 12
        assert state["net/b/followed"] == taken
        assert state["net/b/rows"] == 10 * taken, "what a step gave that was not taken is gone"


def test_a_loss_that_is_not_counted_is_no_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(followers.Book, "targets", toy.Net.targets)
    with pytest.raises(AssertionError, match="has no gradient: 'commitment'"):
        plain(tmp_path, "Follows")
    monkeypatch.delattr(followers.Book, "stepped")
    with pytest.raises(AssertionError, match="does not count its loss"):
        plain(tmp_path, "Follows", 2)


@pytest.mark.timeout(120)
def test_zero_3_is_refused_to_what_follows_weights(tmp_path, monkeypatch):
    job = {"folder": str(tmp_path / "run"), "stage": 3, "task": f"{PLACE}Averages", "do": "refused"}
    for small in (False, True):
        (told,) = run_workers(tmp_path, 1, [job | {"small": small}])
        assert told == (
            "What follows a step of 'net' computes with its weights, which ZeRO 3 spreads over the workers. Give "
            "--cluster.zero-stage 2 or less."
        )
    monkeypatch.setattr(fit, "connect", lambda cluster: pytest.fail("it started"))
    toy.write_rows(f"{tmp_path}/rows")
    training = Training(followers.Averages(), [f"{tmp_path}/rows"], TrainConfig(steps=1, batch=10), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="stage 2 or less"):
        fit.fit([training], Cluster(name="spread", zero_stage=3), print)


FROZEN = {"w/base.table.weight", "w/base.layers.0.base.weight", "w/base.layers.0.base.bias", "b/base.layers.0.gain"}


def test_a_checkpoint_holds_of_a_base_what_is_trained(tmp_path, references):
    whole, _ = plain(tmp_path, "Whole")
    state, _ = references["Based"]
    assert whole.keys() - state.keys() == {f"net/{name}" for name in FROZEN}
    assert {f"net/{kind}/base.layers.0.up.weight" for kind in ("w", "exp_avg", "exp_avg_sq", "ema")} <= state.keys()
    assert all(torch.equal(state[name], whole[name]) for name in state)
    plain(tmp_path, "Based")
    sizes = {name: _bytes(tmp_path / f"{name}-1") for name in ("Based", "Whole")}
    print(f"Bytes of a checkpoint: {sizes['Based']:,}, and with its base {sizes['Whole']:,}.")
    assert sizes["Whole"] - sizes["Based"] > 2 * (500 * 16 + 16 * 16 + 16)


def _bytes(folder):
    return sum(part["size"] for part in newest(folder).meta["parts"])


def test_one_that_holds_the_base_goes_on_without_it_and_what_is_exported_has_it(tmp_path, references):
    """Checkpoints of before `rebuilt` was said are good, and so are moments and the average of what is trained."""
    plain(tmp_path, "Whole", **CUT, steps=10)
    shutil.copytree(tmp_path / "Whole-1", tmp_path / "Based-1")
    wanted, (state, _) = plain(tmp_path, "Whole")[0], plain(tmp_path, "Based")
    assert state.keys() == references["Based"][0].keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)
    saved = checkpoint.Checkpoint(newest(tmp_path / "Based-1").url)
    export(followers.Based(), saved, str(tmp_path / "model"))
    found, (fresh,) = load_file(tmp_path / "model" / "net.safetensors"), followers.Based().updates()
    for name in FROZEN:
        key = name.partition("/")[2]
        assert torch.equal(found[key], fresh.module.state_dict()[key])
        assert found[key].dtype == fresh.module.state_dict()[key].dtype
    assert torch.equal(found["base.layers.0.up.weight"], state["net/ema/base.layers.0.up.weight"])


def test_what_is_not_rebuilt_is_demanded():
    (update,) = followers.Whole().updates()

    class Saved(dict):
        meta = {}

        def __getitem__(self, name):
            raise ValueError(f"it has no '{name}'")

    with pytest.raises(ValueError, match="it has no"):
        load_weights(update, Saved())
    with pytest.raises(AttributeError, match="nowhere"):
        followers.swapped(update, update.module, rebuilt=("nowhere",))


@pytest.mark.timeout(120)
def test_a_base_in_16_bits_stays_so_under_autocast(tmp_path, references):
    """Its modules assert it in each forward pass."""
    jobs = [
        {"folder": str(tmp_path / f"{stage}"), "stage": stage, "task": f"{PLACE}Based",
         "config": {"precision": "bf16", "steps": 4, "save_every_steps": 2}}
        for stage in (0, 1, 2, 3)
    ]  # fmt: skip
    for job, losses in zip(jobs, run_workers(tmp_path, 2, jobs), strict=True):
        assert losses == pytest.approx(references["Based"][1][:4], rel=0.05)
        assert final_state(job["folder"]).keys() == references["Based"][0].keys()


@pytest.mark.timeout(120)
def test_rows_of_several_lengths_meet(tmp_path):
    """Seven rows of a step: three workers have places without a row, in the middle of the order, too."""
    wanted = plain(tmp_path, "Meets", batch=7)
    jobs = [
        {"folder": str(tmp_path / f"{micro}"), "stage": 1, "task": f"{PLACE}Meets", "micro_steps": micro,
         "config": {"batch": 7}}
        for micro in (1, 2)
    ]  # fmt: skip
    for job, losses in zip(jobs, run_workers(tmp_path, 3, jobs), strict=True):
        alike((final_state(job["folder"]), losses), wanted)


@st.composite
def batches(draw):
    """Micro-batches of rows of several lengths, some of weight 0."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        count, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
        weight = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=count, max_size=count)))
        ids = torch.randint(1, 9, (count, length))
        parts.append(
            {"weight": weight, "ids": ids, "known": ids > 4, "pull": torch.rand(1, 3), "at": torch.rand(count)}
        )
    return parts


@given(batches())
def test_rows_of_micro_batches_are_those_of_weight_in_order(parts):
    seen = world.rows(*parts)
    rows = [
        (part["ids"][row], part["at"][row], weight)
        for part in parts
        for row, weight in enumerate(part["weight"])
        if weight
    ]
    assert len(seen["weight"]) == len(seen["ids"]) == len(seen["known"]) == len(seen["at"]) == len(rows)
    assert seen["ids"].shape[1] == max(part["ids"].shape[1] for part in parts)
    assert seen["known"].dtype == torch.bool
    for place, (ids, at, weight) in enumerate(rows):
        assert seen["ids"][place].tolist() == [*ids.tolist(), *[0] * (seen["ids"].shape[1] - len(ids))]
        assert seen["known"][place].tolist() == [*(ids > 4).tolist(), *[False] * (seen["ids"].shape[1] - len(ids))]
        assert seen["at"][place] == at
        assert seen["weight"][place] == weight
    before = [sum(int((part["weight"] > 0).sum()) for part in parts[:number]) for number in range(len(parts))]
    assert seen["first"].tolist() == before
    if all(len(part["weight"]) > 1 for part in parts):  # of one row, a column of all rows is that row's
        assert torch.equal(seen["pull"], torch.cat([part["pull"] for part in parts]))


def test_columns_without_weight_stay_whole():
    seen = world.rows({"pull": torch.ones(1, 3)}, {"pull": torch.full((1, 3), 2.0)})
    assert seen["pull"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert seen["first"].tolist() == [0, 1]
