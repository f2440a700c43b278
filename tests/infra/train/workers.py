"""Starts groups of real workers that do jobs of `toy`, and compares what they saved."""

import json
import os
import socket
import subprocess
import sys

import torch

from infra.train import checkpoint
from tests.infra.train import toy


def run_workers(place, world, jobs, seconds=230):
    """What each job returned, done by one group of `world` workers, one job after another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = str(place / f"result-{port}.json")
    environment = {
        **os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    arguments = json.dumps({"jobs": jobs, "result": result})
    command = [sys.executable, "-W", "ignore", "-m", "tests.infra.train.toy", arguments]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        assert [worker.wait(seconds) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
    with open(result) as file:
        return json.load(file)


def newest(folder):
    """The newest whole checkpoint of a training."""
    return checkpoint.Checkpoint(checkpoint.newest(str(folder)))


def final_state(folder):
    """All its tensors."""
    return toy.final_state(newest(folder))


def distance(a, b, update="net"):
    """Norm of the difference over norm, whole model."""
    names = [name for name in a if name.startswith(f"{update}/w/")]
    flat = [torch.cat([state[name].flatten() for name in names]) for state in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())
