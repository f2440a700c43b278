"""Every ZeRO stage at every world size trains as one plain process does, and continues what another saved."""

import math
import random
import shutil

import pytest
import torch

from infra.train import checkpoint
from infra.train.engine import PlainEngine
from tests.infra.train import toy
from tests.infra.train.workers import BARE, distance, final_state, newest, run_workers

STAGES = (0, 1, 2, 3)
LONG = {"steps": 50, "save_every_steps": 50}
CUT = {"steps": 7, "save_every_steps": 7}
PAIR = "tests.infra.train.toy:Pair"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return toy.plain(str(tmp_path_factory.mktemp("plain")), **LONG)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2, *(pytest.param(world, marks=pytest.mark.long) for world in (3, 4))])
def test_every_stage_trains_like_one_plain_process(tmp_path, reference, world):
    jobs = [
        # Micro-steps and small parameters, which stage 3 else keeps whole, take turns.
        {"folder": str(tmp_path / f"{stage}"), "stage": stage, "micro_steps": 1 + (stage + world) % 2,
         "small": world > 2, "config": LONG}
        for stage in STAGES
    ]  # fmt: skip
    for stage, losses in zip(STAGES, run_workers(tmp_path, world, jobs), strict=True):
        state = final_state(tmp_path / f"{stage}")
        assert losses == pytest.approx(reference[1], rel=1e-5)
        assert distance(state, reference[0]) < 1e-4
        assert state.keys() == reference[0].keys()
        assert newest(tmp_path / f"{stage}").meta["updates"]["net"] == {"optimizer_step": 50}
        for name, value in state.items():
            if name != "net/b/calls":  # micro-steps are calls, too
                torch.testing.assert_close(value, reference[0][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def saved_at_four(tmp_path_factory):
    """By stage, the folder of a training that four workers saved."""
    place = tmp_path_factory.mktemp("four")
    folders = {stage: str(place / str(stage)) for stage in STAGES}
    run_workers(place, 4, [{"folder": folders[stage], "stage": stage, "config": CUT} for stage in STAGES])
    return folders


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [2, 1, 3])
def test_what_four_workers_saved_is_exact_and_goes_on_at_any_other_world_size_and_stage(tmp_path, saved_at_four, world):
    pairs = [(stage, other) for stage in STAGES for other in {stage, (stage + world) % 4}]
    copies = [
        {"do": "copy", "folder": saved_at_four[stage], "out": str(tmp_path / f"{stage}-{other}"), "stage": other,
         "small": bool(world % 2)}
        for stage, other in pairs
    ]  # fmt: skip
    going_on = []
    for stage in STAGES:
        folder = str(tmp_path / f"{stage}")
        shutil.copytree(saved_at_four[stage], folder)
        going_on.append({"folder": folder, "stage": (stage + world) % 4, "micro_steps": 1 + world % 2})
    results = run_workers(tmp_path, world, copies + going_on)
    for stage, other in pairs:
        wanted, copy = newest(saved_at_four[stage]), newest(tmp_path / f"{stage}-{other}")
        assert copy.meta["updates"] == wanted.meta["updates"] == {"net": {"optimizer_step": 7}}
        assert sorted(copy.names) == sorted(wanted.names)
        assert {name.split("/")[1] for name in copy.names} == {"w", "b", "exp_avg", "exp_avg_sq", "ema"}
        assert "net/b/shift" not in copy.names  # not persistent
        for name in wanted.names:
            assert copy[name].dtype == wanted[name].dtype
            assert torch.equal(copy[name], wanted[name]), f"{name}, from stage {stage} at 4 to stage {other} at {world}"
    # The cut run planned its cosine for 7 steps: compare with a plain run cut the same way.
    toy.plain(str(tmp_path / "plain"), **CUT)
    wanted, wanted_losses = toy.plain(str(tmp_path / "plain"))
    for job, losses in zip(going_on, results[len(copies) :], strict=True):
        state = final_state(job["folder"])
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
        assert distance(state, wanted) < 1e-5
        for name in wanted.keys() - {"net/b/calls"}:
            torch.testing.assert_close(state[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.timeout(240)
def test_a_cut_run_is_bit_equal_on_the_same_world(tmp_path):
    seed = random.randrange(2**32)
    print(f"The cuts are drawn by seed {seed}.")
    at, jobs = random.Random(seed).choices(range(1, 12), k=len(STAGES)), []
    for stage in STAGES:
        whole = {"folder": str(tmp_path / f"whole{stage}"), "stage": stage, "config": {"save_every_steps": 12}}
        cut = {"folder": str(tmp_path / f"cut{stage}"), "stage": stage, "config": {"save_every_steps": at[stage]}}
        jobs += [whole, cut, {**cut, "do": "tear"}, cut]
    results = run_workers(tmp_path, 2, jobs)
    for stage in STAGES:
        losses, before, _, after = results[4 * stage : 4 * stage + 4]
        left = 12 - 11 // at[stage] * at[stage]  # steps after the newest checkpoint that is whole
        assert before == losses
        assert after == losses[-left:], f"stage {stage}, cut at {12 - left}, seed {seed}"
        state, whole = (final_state(tmp_path / f"{kind}{stage}") for kind in ("cut", "whole"))
        assert all(torch.equal(state[name], whole[name]) for name in whole)


@pytest.mark.timeout(240)
def test_workers_without_a_row_agree(tmp_path):
    """Four rows of a step are shared by three workers two by two: the third has padding alone."""
    jobs = [
        {"folder": str(tmp_path / f"{stage}-{steps}"), "stage": stage, "micro_steps": steps, "config": {"batch": 4}}
        for stage in STAGES
        for steps in (1, 2)
    ]
    wanted, wanted_losses = toy.plain(str(tmp_path / "plain"), batch=4)
    for job, losses in zip(jobs, run_workers(tmp_path, 3, jobs), strict=True):
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
        assert distance(final_state(job["folder"]), wanted) < 1e-5


@pytest.mark.timeout(240)
def test_two_engines_take_turns_and_one_that_sleeps_is_saved_asleep(tmp_path):
    short, long = {"steps": 3, "save_every_steps": 3}, {"steps": 8, "save_every_steps": 8}
    jobs = [
        {"folder": str(tmp_path / f"{stage}"), "stage": (stage + turn) % 4, "task": PAIR, "config": config}
        for stage in STAGES
        for turn, config in enumerate((short, long))
    ]
    results = run_workers(tmp_path, 2, jobs)
    toy.plain(str(tmp_path / "plain"), toy.Pair(), **short)
    wanted, losses = toy.plain(str(tmp_path / "plain"), toy.Pair(), **long)
    for stage in STAGES:
        state = final_state(tmp_path / f"{stage}")
        assert results[2 * stage + 1] == pytest.approx(losses, rel=1e-5)
        assert state.keys() == wanted.keys()
        assert max(distance(state, wanted, update) for update in ("net", "late")) < 1e-5
        steps = {
            update: meta["optimizer_step"] for update, meta in newest(tmp_path / f"{stage}").meta["updates"].items()
        }
        assert steps == {"net": 8, "late": 4}


@pytest.mark.timeout(240)
def test_memory_is_saved_without_changing_a_number(tmp_path):
    """Offload and recomputed blocks, against the same training without them."""

    def job(name, stage, **options):
        return {"folder": str(tmp_path / name), "stage": stage, "micro_steps": 2, "small": True, **options}

    light = {stage: job(f"light{stage}", stage, recompute=True) for stage in STAGES}
    offloaded = {stage: job(f"offloaded{stage}", stage, offload="optimizer") for stage in (1, 2, 3)}
    offloaded[4] = job("parameters", 3, offload="parameters", recompute=True)
    back = {**job("copied", 3, offload="parameters"), "do": "copy", "folder": offloaded[2]["folder"]}
    back["out"] = str(tmp_path / "copied")
    forth = {**job("continued", 1, offload="optimizer"), "config": {"steps": 14}, "folder": offloaded[4]["folder"]}
    jobs = [job(f"{stage}", stage) for stage in STAGES] + [*light.values(), *offloaded.values(), back, forth]
    results = run_workers(tmp_path, 2, jobs)
    for stage in STAGES:
        state, wanted = final_state(tmp_path / f"light{stage}"), final_state(tmp_path / f"{stage}")
        assert results[4 + stage] == results[stage]
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted), f"stage {stage}, recomputed"
    wanted, losses = toy.plain(str(tmp_path / "plain"))
    for number, one in enumerate(offloaded.values()):
        assert results[8 + number] == pytest.approx(losses, rel=1e-5)
        if one["stage"] < 3 or one["offload"] == "optimizer":  # the other went on
            assert distance(final_state(one["folder"]), wanted) < 1e-5
    saved, copied = final_state(offloaded[2]["folder"]), final_state(tmp_path / "copied")
    assert all(torch.equal(saved[name], copied[name]) for name in saved)
    assert len(results[-1]) == 2
    assert newest(offloaded[4]["folder"]).meta["updates"]["net"] == {"optimizer_step": 14}


@pytest.mark.timeout(240)
def test_sixteen_bits_train(tmp_path):
    jobs = [
        {"folder": str(tmp_path / f"{stage}-{precision}"), "stage": stage, "config": {"precision": precision}}
        for stage in STAGES
        for precision in ("bf16", "fp16", "fp32")  # the last one as if nothing had been before it
    ]
    copies = [
        {"do": "copy", "folder": str(tmp_path / "2-fp16"), "out": str(tmp_path / f"copy{stage}"), "stage": stage,
         "config": {"precision": "fp16"}}
        for stage in STAGES
    ]  # fmt: skip
    results = run_workers(tmp_path, 2, jobs + copies)
    for copy in copies:
        assert newest(copy["out"]).meta["updates"] == newest(copy["folder"]).meta["updates"]
    wanted = toy.plain(str(tmp_path / "plain"))[1]
    for job, losses in zip(jobs, results, strict=False):
        precision = job["config"]["precision"]
        assert losses == pytest.approx(wanted, rel={"bf16": 0.05, "fp16": 0.01, "fp32": 1e-5}[precision])
        meta = newest(job["folder"]).meta["updates"]["net"]
        scale = {"loss_scale": {"value": 256.0, "good_steps": 12}} if precision == "fp16" else {}
        assert meta == {"optimizer_step": 12, **scale}
    # No new scaler has this scale: who has it loaded it.
    saved = newest(tmp_path / "2-fp16")
    scale = {"loss_scale": {"value": 32.0, "good_steps": 12}}
    checkpoint.write_commit(saved.url, saved.meta | {"updates": {"net": saved.meta["updates"]["net"] | scale}})
    for world in (1, 3):
        longer = {"precision": "fp16", "steps": 14}
        for stage in STAGES:
            shutil.copytree(tmp_path / "2-fp16", tmp_path / f"{world}-{stage}")
        going_on = [
            {"folder": str(tmp_path / f"{world}-{stage}"), "stage": stage, "config": longer} for stage in STAGES
        ]
        for job, losses in zip(going_on, run_workers(tmp_path, world, going_on), strict=True):
            assert len(losses) == 2
            scale = {"loss_scale": {"value": 32.0, "good_steps": 14}}
            assert newest(job["folder"]).meta["updates"] == {"net": {"optimizer_step": 14, **scale}}


@pytest.mark.timeout(240)
def test_gradients_are_added_in_fp32_whatever_they_are_computed_in(tmp_path):
    """1 + 2^-12 is more than 16 bits hold."""
    jobs = [
        {"do": "tests.infra.train.followers:added", "stage": stage, "micro_steps": steps, "small": small,
         "config": {"precision": precision}}
        for precision in ("bf16", "fp16", "fp32")
        for stage in STAGES
        for steps, small in [(1, True), (2, True), (1, False)]
    ]  # fmt: skip
    for job, norm in zip(jobs, run_workers(tmp_path, 2, jobs), strict=True):
        assert norm == pytest.approx(2 * job["micro_steps"] * (1 + 2**-12), rel=1e-6), job  # of four weights


@pytest.mark.timeout(120)
def test_who_saves_or_reads_slowly_is_waited_for(tmp_path):
    """By a group that has patience, and not in a collective of DeepSpeed's, whose time is short."""
    jobs = [
        {"do": "tests.infra.train.followers:slow", "folder": str(tmp_path / str(stage)), "stage": stage}
        for stage in (3, 1)
    ]
    for losses in run_workers(tmp_path, 2, jobs, seconds=90):
        assert len(losses) == 3


@pytest.mark.timeout(240)
def test_a_gradient_that_is_no_number_is_seen_by_every_worker_and_changes_nothing(tmp_path):
    jobs = [
        {"do": "poison", "folder": "", "stage": stage, "offload": offload, "config": {"precision": precision}}
        for precision in ("fp32", "bf16", "fp16")
        for stage, offload in [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "parameters")]
    ]
    for job, workers in zip(jobs, run_workers(tmp_path, 2, jobs), strict=True):
        for seen in workers:
            finite = [math.isfinite(float(norm)) for norm in seen["norms"]]
            assert finite == [True, True, False, True], job
            assert set(seen["changed"]) <= {"net/b/calls"}, job
            assert seen["moved"]
            assert [meta["optimizer_step"] for meta in seen["metas"]] == [1, 2, 2, 3]
            scales = [meta.get("loss_scale") for meta in seen["metas"]]
            if job["config"]["precision"] == "fp16":
                pairs = [(256, 1), (256, 2), (128, 0), (128, 1)]
                assert scales == [{"value": value, "good_steps": steps} for value, steps in pairs]
            else:
                assert scales == [None] * 4
        assert workers[0]["norms"] == workers[1]["norms"]


def test_the_plain_engine_sees_it_too():
    (update,) = toy.Toy().updates()
    engine = PlainEngine(update)
    (batch,) = next(toy.feed(toy.TrainConfig(steps=1, batch=10), 0, 1, 1)(0))
    engine.backward(engine(batch)["token"])
    assert math.isfinite(engine.step(1e-3))
    before, meta = {name: value.clone() for name, value in engine.state().items()}, engine.meta()
    batch["poison"] = torch.ones(10)
    batch["poison"][3] = 0
    engine.backward(engine(batch)["token"])
    assert not math.isfinite(engine.step(1e-3))
    after = engine.state()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"net/b/calls"}
    assert engine.meta() == meta


@pytest.mark.timeout(120)
def test_no_compiler_is_loaded_to_train_and_flops_are_the_models_own(tmp_path, monkeypatch):
    """Importing torch's takes seconds of every start; DeepSpeed imports it nevertheless for ZeRO 3.

    There is none on the machine, from the process's first line on, nor anything that one made.
    What the engines do beside the model, as to compute activations again, counts for nothing.
    """
    for name, value in BARE.items():
        monkeypatch.setenv(name, value)
    jobs = [{"folder": str(tmp_path / str(stage)), "stage": stage} for stage in (0, 1, 2)]
    jobs += [{"do": "flops", "stage": stage} for stage in (0, 1, 2)]
    more = [{"do": "flops", "stage": stage, "recompute": True} for stage in (2, 3)]
    *_, a, b, c, loaded, d, e = run_workers(tmp_path, 1, [*jobs, {"do": "compilers"}, *more], method="spawn")
    assert loaded == []
    # Places of a row, and of its matrix products: forward, and backward to weights and inputs. What is frozen is not
    # learned, but what lies before it is. The first product of a blocks' Sequential is 16 x 7.
    places, learned, frozen = 7, 16 * 16 + 4 * 16 * 7 + 16 * 11, 16 * 16
    assert a == b == c == d == e == 2 * places * (3 * learned + 2 * frozen)
