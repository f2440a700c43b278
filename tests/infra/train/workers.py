"""Starts groups of real workers that do jobs of `toy`, and compares what they saved."""

import json
import multiprocessing
import os
import socket
import warnings

import torch

from infra.train import checkpoint
from tests.infra.train import toy

# Workers are forked from a process that has imported all this once, which takes several seconds; ZeRO 3 loads dynamo.
LOADED = [toy.__name__, "infra.train.zero", "torch._dynamo", "tests.captioner.worker", "tests.infra.train.followers"]
multiprocessing.get_context("forkserver").set_forkserver_preload(LOADED)

# Nothing that trains compiles anything: workers find no compiler, and nothing that was compiled before.
BARE = {"PATH": "/nowhere", "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}


def run_workers(place, world, jobs, seconds=230, method="forkserver", work=toy.work):
    """What each job returned, done by one group of `world` workers, one job after another; each calls `work`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = str(place / f"result-{port}.json")
    where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    where |= BARE | {"TORCH_EXTENSIONS_DIR": str(place / "extensions")}
    context = multiprocessing.get_context(method)
    workers = [
        context.Process(target=_work, args=({**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}, work, jobs, result))
        for rank in range(world)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds)
        assert [worker.exitcode for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
    with open(result) as file:
        return json.load(file)


def _work(environment, work, jobs, result):
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    work(jobs, result)


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
