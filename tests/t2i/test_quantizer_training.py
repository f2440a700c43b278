"""Quantizers that draw, or follow what they saw, train alike however their rows and state are shared out."""

import pytest
import torch

from t2i.tokenizers.codebook import AveragedCodebook
from t2i.tokenizers.turns import GeneratorTurn
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, run_workers
from tests.t2i import bottlenecks

TASKS = ("averaged", "judged_averaged", "gumbel", "judged_gumbel", "lookup_free")
STEPS = {"steps": 8, "save_every_steps": 8}


def job(folder, name, stage=0, micro_steps=1, **more):
    task = f"tests.t2i.bottlenecks:{name}"
    return {"folder": str(folder), "stage": stage, "micro_steps": micro_steps, "task": task, "config": STEPS, **more}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return {
        name: toy.plain(str(tmp_path_factory.mktemp(name)), getattr(bottlenecks, name)(), **STEPS) for name in TASKS
    }


def alike(found, wanted, most):
    """The same losses at each step, the same codes, and the same weights but for `most` of their norm."""
    (state, log), (wanted, wanted_log) = found, wanted
    assert len(log) == len(wanted_log)
    for losses, others in zip(log, wanted_log, strict=True):
        assert losses == pytest.approx(others, rel=2e-5, abs=2e-6)  # a critic's opinion is about 0
    assert state.keys() == wanted.keys()
    for update in {name.partition("/")[0] for name in wanted}:
        assert distance(state, wanted, update) < most
    for name in wanted:
        if "/b/" in name:
            torch.testing.assert_close(state[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_learns(references, name):
    state, log = references[name]
    assert len(log) == 8
    assert all(torch.isfinite(torch.tensor([*losses.values()])).all() for losses in log)
    followed = [key for key in state if "/b/" in key]
    quantizer = "tokenizer/b/tokenizer.quantizer."
    expected = {"averaged": ["counts", "sums"], "lookup_free": ["usage"]}.get(name.removeprefix("judged_"), [])
    assert sorted(followed) == [quantizer + each for each in expected]


def test_codes_die_and_come_back_while_it_trains(tmp_path, monkeypatch):
    """The comparisons below mean something."""
    revived, stepped = [], AveragedCodebook.stepped

    def watched(self, sums):
        stepped(self, sums)
        revived.append(int((self.counts == self.config.dead_below).sum()))

    monkeypatch.setattr(AveragedCodebook, "stepped", watched)
    toy.plain(str(tmp_path), bottlenecks.averaged(), **STEPS)
    assert len(revived) == 8
    assert sum(revived) > 3


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("micro_steps", [2, 6])
def test_micro_batches_change_nothing(tmp_path, references, micro_steps, name):
    found = toy.plain(str(tmp_path), getattr(bottlenecks, name)(), micro_steps, **STEPS)
    alike(found, references[name], 1e-4)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_zero_trains_all_like_one_plain_process(tmp_path, references, world):
    jobs = [
        job(tmp_path / f"{name}-{stage}", name, stage, 1 + stage % 2, recompute=stage == 1)
        for name in TASKS
        for stage in ((0, 1, 2) if name.startswith("judged") else (0, 1, 2, 3))
    ]
    for one, log in zip(jobs, run_workers(tmp_path, world, jobs), strict=True):
        alike((final_state(one["folder"]), log), references[one["task"].partition(":")[2]], 1e-4)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_cut_goes_on_bit_equal(tmp_path, world):
    cases = [(name, stage) for name in TASKS for stage in (0, 2 if name.startswith("judged") else 3)]
    jobs = []
    for name, stage in cases:
        whole = job(tmp_path / f"{name}-{stage}", name, stage, 2)
        cut = whole | {"folder": f"{tmp_path}/{name}-{stage}-cut", "config": {"steps": 8, "save_every_steps": 5}}
        jobs += [whole, cut, cut | {"do": "tear"}, cut]
    results = run_workers(tmp_path, world, jobs)
    for place, (name, stage) in enumerate(cases):
        losses, before, _, after = results[4 * place : 4 * place + 4]
        assert before == losses
        assert after == losses[5:]
        state, whole = final_state(tmp_path / f"{name}-{stage}-cut"), final_state(tmp_path / f"{name}-{stage}")
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[each], whole[each]) for each in whole)


def test_what_was_followed_is_in_what_users_load(tmp_path):
    from t2i.tokenizers.task import load_tokenizer

    update, _ = bottlenecks.judged_averaged().updates()
    assert isinstance(update.module, GeneratorTurn)
    update.module.tokenizer.quantizer.sums.normal_(generator=torch.Generator().manual_seed(1))
    bottlenecks.judged_averaged().export({"tokenizer": update.module}, str(tmp_path))
    codes = torch.arange(24).view(1, 4, 6)
    assert torch.equal(load_tokenizer(str(tmp_path)).decode(codes), update.module.tokenizer.decode(codes))
