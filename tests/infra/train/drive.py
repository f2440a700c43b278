"""A driver that trains the toy task, as a process that can be killed: `python -m tests.infra.train.drive '{...}'`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.cluster import Cluster
from infra.metrics import read_scalars
from infra.train import ids
from infra.train.fit import Training, fit
from infra.train.loop import TrainConfig
from infra.train.plan import BatchPlan
from tests.infra.train import toy

ROOT = Path(__file__).parents[3]


class Driver:
    """A context: the driver runs within it. `place` holds the rows and what comes out."""

    def __init__(self, place, config, environment=None, task="Toy", **cluster):
        self.place = str(place)
        self._arguments = {"place": self.place, "config": config, "cluster": cluster, "task": task}
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
        """Its training workers, where it started Ray itself."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]


def groups(place, event="ends"):
    """What befell groups of workers, in its order; of one kind, or all of it (None)."""
    path = Path(place, "out", "groups.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if event in (None, line["event"])]


def check(place, config, undisturbed):
    """The same losses at the same steps, and every row once an epoch, as the workers wrote it down."""
    steps, batch, every = (config[name] for name in ("steps", "batch", "log_every_steps"))
    rows = read_scalars(f"{place}/out")
    assert [row["step"] for row in rows] == list(range(every, steps + 1, every))
    assert [row["net/token"] for row in rows] == pytest.approx(undisturbed, rel=2e-5)  # the log has six digits
    used = ids.read_ids(f"{place}/out/ids")
    assert len(used) == steps
    each = ids.row_ids([f"{place}/rows"], ["000000", "000001"], toy.Toy())
    plan = BatchPlan([len(one) for one in each], batch, 0, TrainConfig(steps=1).window_shards)
    assert ids.check(used, plan, each) == steps * batch // toy.ROWS


def main():
    """Train, and end."""
    arguments = json.loads(sys.argv[1])
    place, cluster = arguments["place"], arguments["cluster"]
    cluster = Cluster(**{"name": "test", **cluster, "workers": tuple(cluster["workers"])})
    task = getattr(toy, arguments["task"])()
    fit(
        [Training(task, [f"{place}/rows"], TrainConfig(**arguments["config"]), f"{place}/out")],
        cluster,
        lambda *_, **__: 0,
    )


if __name__ == "__main__":
    main()
