"""A process that waited is the one that is taken, with all loaded that it will want; an ended group asks for none."""

import os
import sys
import time
from contextlib import suppress

import psutil
import pytest
import ray

from infra.train import spare

NEEDED = ("infra.train.worker", "infra.train.trainer", "infra.train.feed", "ray.train.torch", "torch")


class Process:
    """What a group's processes are to Ray: some have the environment that the driver gave, some add to it."""

    def found(self):
        return os.getpid(), [name in sys.modules for name in NEEDED], ray.get_runtime_context().get_runtime_env_string()

    def worker(self):
        self.started = start({})
        return ray.get(self.started.found.remote())


def start(variables):
    return ray.remote(num_cpus=0, runtime_env={"env_vars": variables | {"MORE": "1"}})(Process).remote()


def waiting():
    """The idle processes of Ray."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if process.cmdline()[:1] == ["ray::IDLE"]:
                found.add(process.pid)
    return found


def test_spares_are_taken(ray_cluster):
    first = start(spare.VARIABLES)
    _, _, environment = ray.get(first.worker.remote())
    before, seconds = waiting(), iter([0.0] + [3.0] * 9)

    def goes_on():
        time.sleep(next(seconds))
        return True

    spare.ask([ray.get_runtime_context().get_node_id(), "a node that is gone"], environment, 1, goes_on)
    deadline = time.monotonic() + 60
    while len(spares := waiting() - before) < spare.HELPERS + 2:
        assert time.monotonic() < deadline, "they did not start"
        time.sleep(0.2)
    second = start(spare.VARIABLES)
    pid, loaded, _ = ray.get(second.found.remote())
    assert pid in spares, "a helper"
    assert loaded == [True] * len(NEEDED)
    worker, loaded, _ = ray.get(second.worker.remote())
    assert worker in spares - {pid}, "a worker"
    assert loaded == [True] * len(NEEDED)
    for actor in (first, second):
        ray.kill(actor)
    for pid in spares & waiting():  # else they would wait for as long as the suite runs
        with suppress(psutil.Error):
            psutil.Process(pid).kill()


def test_nobody_is_asked_for_a_group_that_has_ended(ray_cluster):
    before = waiting()
    spare.ask([ray.get_runtime_context().get_node_id()], '{"env_vars": {}}', 1, lambda: False)
    time.sleep(3)
    assert waiting() <= before


def test_what_cannot_be_loaded_is_no_harm(monkeypatch):
    monkeypatch.setitem(sys.modules, "infra.train.trainer", None)
    with pytest.raises(ImportError):
        import infra.train.trainer  # noqa: F401
    spare.load()
