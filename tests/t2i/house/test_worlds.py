"""Every hard spot gives equal losses on one and two workers, under ZeRO, with two micro-batches, cut and continued."""

import pytest
import torch

from tests.infra.train import toy
from tests.infra.train.workers import final_state, run_workers
from tests.t2i.house import worlds

pytestmark = [pytest.mark.long, pytest.mark.timeout(280)]
CONFIG = {"steps": 30, "batch": 20, "log_every_steps": 1, "save_every_steps": 30}
CUT = {**CONFIG, "save_every_steps": 13}
MODULE = worlds.__name__


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Of each spot, what one plain process came to, and its losses."""
    return {
        name: toy.plain(str(tmp_path_factory.mktemp(name)), getattr(worlds, name)(), **CONFIG) for name in worlds.SPOTS
    }


def same(found, wanted):
    assert len(found) == len(wanted) == 30
    for mine, other in zip(found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=2e-4, abs=2e-5)


def close(state, wanted):
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        if "/w/" in name:
            torch.testing.assert_close(value, wanted[name], rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("world", [1, 2])
def test_workers_learn_as_one_plain_process(tmp_path, plain, world):
    jobs = []
    for number, name in enumerate(worlds.SPOTS):
        stages = (number % 3, (number + 1) % 3) if name in worlds.WHOLE else (number % 3, 3)
        for stage in stages:
            jobs.append({
                "task": f"{MODULE}:{name}", "folder": str(tmp_path / f"{name}{stage}"), "stage": stage,
                "micro_steps": 1 + (stage + world) % 2, "config": CONFIG,
            })  # fmt: skip
    for job, losses in zip(jobs, run_workers(tmp_path, world, jobs), strict=True):
        wanted, wanted_losses = plain[job["task"].rpartition(":")[2]]
        same(losses, wanted_losses)
        close(final_state(job["folder"]), wanted)


def test_what_is_cut_goes_on_bit_for_bit(tmp_path, plain):
    jobs = []
    for number, name in enumerate(worlds.SPOTS):
        whole = {"task": f"{MODULE}:{name}", "folder": str(tmp_path / f"{name}"), "stage": number % 3, "config": CONFIG}
        cut = {**whole, "folder": str(tmp_path / f"{name}-cut"), "config": CUT}
        jobs += [whole, cut, {**cut, "do": "tear"}, cut]
    results = run_workers(tmp_path, 2, jobs)
    for place, name in enumerate(worlds.SPOTS):
        losses, before, _, after = results[4 * place : 4 * place + 4]
        assert before == losses
        assert after == losses[-4:]  # from step 26 on
        whole, state = final_state(tmp_path / name), final_state(tmp_path / f"{name}-cut")
        assert whole.keys() == state.keys()
        assert all(torch.equal(state[each], whole[each]) for each in whole), name
