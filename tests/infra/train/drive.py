"""A driver that trains the toy task, as a process that can be killed: `python -m tests.infra.train.drive '{...}'`."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray

from infra.cluster import Cluster
from infra.metrics import read_scalars
from infra.private import loopback
from infra.train import ids
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from infra.train.plan import BatchPlan
from tests.infra.train import toy

ROOT = Path(__file__).parents[3]


class Driver:
    """A context: the driver runs within it. `place` holds the rows and what comes out.

    `on`: the address of a Ray that is up on this machine, which it joins as if it had started it; of what is on it,
    only what this driver's workers are may be harmed. Without it the driver starts its own.
    """

    def __init__(self, place, config, environment=None, task="Toy", on=None, **cluster):
        self.place, self._on = str(place), on
        self._arguments = {"place": self.place, "config": config, "cluster": cluster, "task": task, "on": on}
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}

    def __enter__(self):
        command = [sys.executable, "-W", "ignore", "-m", "tests.infra.train.drive", json.dumps(self._arguments)]
        options = {"env": self._environment, "cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **options)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def wait_for_step(self, step, seconds=120):
        """Until a step is logged."""
        self.wait(lambda: any(row["step"] >= step for row in read_scalars(f"{self.place}/out")), seconds)

    def wait(self, condition, seconds=120):
        """Until something holds; AssertionError if the driver ends before, or time does."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the driver ended before: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"it did not come in {seconds} s; {groups(self.place)}"
            time.sleep(0.05)

    def wait_for_group(self, number, seconds=120):
        """Until the group of that number, from 0, has made a step."""
        self.wait(lambda: len(groups(self.place, "first step")) > number, seconds)

    def end(self, seconds=120):
        """Its exit code and what it said."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def workers(self):
        """Its training workers, where it started Ray itself; on one of the tests' process, which has no others then."""
        family = psutil.Process(os.getpid() if self._on else self.process.pid).children(recursive=True)
        return [process for process in family if "RayTrainWorker" in " ".join(title(process))]


def title(process):
    """The command line of a process; of one that has just ended, none."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def here(place, config, task="Toy", **cluster):
    """A driver that goes on and that nobody harms, in this process, on the Ray that is up in it."""
    train({"place": str(place), "config": config, "cluster": cluster, "task": task})


def groups(place, event="ends"):
    """What befell groups of workers, in its order; of one kind, or all of it (None)."""
    path = Path(place, "out", "groups.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if event in (None, line["event"])]


@functools.cache
def undisturbed(steps):
    """The losses of each step of one plain process."""
    with tempfile.TemporaryDirectory() as folder:
        return toy.plain(folder, steps=steps, save_every_steps=steps)[1]


def check(place, config):
    """The losses of a plain process at the same steps, and every row once an epoch, as the workers wrote it down."""
    steps, batch, every = (config[name] for name in ("steps", "batch", "log_every_steps"))
    rows = read_scalars(f"{place}/out")
    assert [row["step"] for row in rows] == list(range(every, steps + 1, every))
    assert [row["net/token"] for row in rows] == pytest.approx(
        undisturbed(steps)[every - 1 :: every], rel=2e-5
    )  # the log has six digits
    used = ids.read_ids(f"{place}/out/ids")
    assert len(used) == steps
    each = ids.row_ids([f"{place}/rows"], ["000000", "000001"], toy.Toy())
    plan = BatchPlan([len(one) for one in each], batch, 0, TrainConfig(steps=1).window_shards)
    assert ids.check(used, plan, each) == steps * batch // toy.ROWS


def train(arguments):
    """Train as told, on the Ray that is up in this process, or that is started for it."""
    place, cluster = arguments["place"], arguments["cluster"]
    cluster = Cluster(**{"name": "test", **cluster, "workers": tuple(cluster["workers"])})
    task = getattr(toy, arguments["task"])()
    fit(
        [Training(task, [f"{place}/rows"], TrainConfig(**arguments["config"]), f"{place}/out")],
        cluster,
        lambda *_, **__: 0,
    )


def main():
    """Train, and end."""
    arguments = json.loads(sys.argv[1])
    if arguments["on"]:
        with loopback():  # else Ray takes the address for a mistake
            ray.init(address=arguments["on"], log_to_driver=False, logging_level="error")
    train(arguments)


if __name__ == "__main__":
    main()
