"""A KL autoencoder and its critic train alike however rows are shared out: what is drawn is drawn by a row's key."""

import pytest
import torch

from infra.train.recompute import recompute
from t2i.nn.weights import initialize
from t2i.random import keys_of
from t2i.tokenizers.turns import GeneratorTurn
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, run_workers
from tests.t2i.judged import KL, SUMS, latents

STEPS = {"steps": 6, "save_every_steps": 6}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return toy.plain(str(tmp_path_factory.mktemp("plain")), latents(), **STEPS)


def alike(found, wanted, most):
    (state, log), (wanted, wanted_log) = found, wanted
    assert len(log) == len(wanted_log) == STEPS["steps"]
    for losses, others in zip(log, wanted_log, strict=True):
        assert losses == pytest.approx(others, rel=1e-4, abs=1e-6)
    assert state.keys() == wanted.keys()
    assert max(distance(state, wanted, update) for update in ("tokenizer", "critic")) < most


def test_the_reference_draws_and_is_judged(reference):
    _, log = reference
    assert all(losses["tokenizer/kl"] > 0 for losses in log)
    assert [losses["tokenizer/adversarial"] != 0 for losses in log] == [False] * 2 + [True] * 4


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_workers_and_micro_batches_change_nothing(tmp_path, reference, world):
    jobs = [
        {"folder": str(tmp_path / f"{stage}-{steps}"), "stage": stage, "micro_steps": steps,
         "task": "tests.t2i.judged:latents", "config": STEPS}
        for stage in (0, 2)
        for steps in (1, 2)
    ]  # fmt: skip
    for job, log in zip(jobs, run_workers(tmp_path, world, jobs), strict=True):
        alike((final_state(job["folder"]), log), reference, 1e-3)


def test_blocks_that_are_computed_again_hear_the_same_draw():
    gradients = []
    for light in (False, True):
        turn = GeneratorTurn(KL.build(), SUMS).train()
        initialize(turn, 0)
        assert not light or recompute(turn)
        images = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        batch = {"images": images, "weight": torch.ones(3), "step": torch.tensor(0), "noise_key": keys_of([1, 2, 3])}
        losses = turn(batch)
        sum(losses.values()).backward()
        gradients.append([*losses.values(), *(parameter.grad for parameter in turn.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
