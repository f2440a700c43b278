"""Every ZeRO stage at every world size trains as one plain process does, and continues what another saved."""

import math
import os

import pytest
import torch

from infra.train import checkpoint
from infra.train.engine import PlainEngine
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, newest, run_workers

STAGES = (0, 1, 2, 3)
LONG = {"steps": 50, "save_every_steps": 50}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return toy.plain(str(tmp_path_factory.mktemp("plain")), **LONG)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
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
