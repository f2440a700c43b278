"""Every ZeRO stage at every world size trains as one plain process does, and continues what another saved."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from infra.train import checkpoint
from tests.infra.train import toy


def run_workers(tmp_path, folder, stage, world, micro_steps=1, **config):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = str(tmp_path / "losses.json")
    arguments = {"folder": str(folder), "stage": stage, "micro_steps": micro_steps, "config": config, "result": result}
    environment = {
        **os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "tests.infra.train.toy", json.dumps(arguments)]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        assert [worker.wait(90) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
    with open(result) as file:
        losses = json.load(file)
    return toy.final_state(checkpoint.Checkpoint(checkpoint.newest(str(folder)))), losses


def distance(a, b):
    """Norm of the difference over norm, whole model."""
    names = [name for name in a if name.startswith("net/w/")]
    flat = [torch.cat([state[name].flatten() for name in names]) for state in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return toy.plain(str(tmp_path_factory.mktemp("plain")))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("stage", "world", "micro_steps"), [(1, 1, 1), (1, 3, 2), (2, 2, 1), (3, 2, 2), (3, 3, 1)])
def test_zero_trains_like_one_plain_process(tmp_path, reference, stage, world, micro_steps):
    state, losses = run_workers(tmp_path, tmp_path / "run", stage, world, micro_steps)
    assert losses == pytest.approx(reference[1], rel=1e-5)
    assert distance(state, reference[0]) < 1e-5
    assert state.keys() == reference[0].keys()
    for name, value in state.items():
        torch.testing.assert_close(value, reference[0][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("stage", "then_stage", "then_world"), [(1, 1, 2), (2, 3, 3), (3, 2, 1)])
def test_a_checkpoint_continues_at_any_stage_and_world_size(tmp_path, reference, stage, then_stage, then_world):
    run_workers(tmp_path, tmp_path / "run", stage, 2, steps=7)
    state, losses = run_workers(tmp_path, tmp_path / "run", then_stage, then_world, steps=12)
    # The cut run planned its cosine for 7 steps: compare with a plain run cut the same way.
    toy.plain(str(tmp_path / "plain"), steps=7)
    wanted, wanted_losses = toy.plain(str(tmp_path / "plain"), steps=12)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert distance(state, wanted) < 1e-5
    for name, value in state.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.timeout(240)
def test_a_cut_run_is_bit_equal_on_the_same_world(tmp_path):
    whole, _ = run_workers(tmp_path, tmp_path / "whole", 2, 2, steps=12, save_every_steps=12)
    run_workers(tmp_path, tmp_path / "cut", 2, 2, steps=12, save_every_steps=5)
    os.unlink(tmp_path / "cut" / f"{12:09d}" / checkpoint.COMMIT)  # as if killed before the last commit
    state, losses = run_workers(tmp_path, tmp_path / "cut", 2, 2, steps=12, save_every_steps=5)
    assert len(losses) == 2  # it went on at step 10, not at 0
    assert all(torch.equal(state[name], whole[name]) for name in whole)


@pytest.mark.timeout(120)
def test_bf16_trains(tmp_path, reference):
    _, losses = run_workers(tmp_path, tmp_path / "run", 2, 2, precision="bf16")
    assert losses == pytest.approx(reference[1], rel=0.05)
