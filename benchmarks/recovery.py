"""Seconds from a fault to the next training step: of a node, of a worker, and until a node that joins is used.

    python -m benchmarks.recovery --repeats 5

A head without CPUs and two nodes of one machine (`benchmarks/nodes.py`), a training of 1 to 2 workers whose steps take
some 50 ms. Each round kills a worker, kills its node, and starts a node again; in between it trains for
`settle_seconds`, in which spare processes load what they will want (`infra/train/spare.py`). Prints one JSON object:
every figure, the medians, and where the time went: until the old group had ended (`seen`: the fault is noticed, and the
group is shut down), until there were places for the next group (`places`), and from there to its first step (`start`:
Ray Train's controller, workers, what had not been loaded, checkpoint, feed).
"""

import functools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import tyro

from benchmarks.nodes import Nodes
from tests.infra.train import toy
from tests.infra.train.drive import Driver, groups

STEPS = 10**6  # more than there is time for


@dataclass(frozen=True, kw_only=True)
class Config:
    repeats: int = 5
    grow_seconds: float = 5  # that a group trains before it makes room for more
    settle_seconds: float = 40  # of training between two faults


def main(config: Config) -> None:
    """Measure, and print."""
    measured: dict[str, list[dict[str, float]]] = {"worker": [], "node": [], "join": []}
    with tempfile.TemporaryDirectory() as place, Nodes() as nodes:
        toy.write_rows(f"{place}/rows")
        first = nodes.add(0, cpus=2)
        second = nodes.add(1, cpus=2)
        cluster = {"workers": (1, 2), "zero_stage": 2, "grow_seconds": config.grow_seconds, "address": nodes.address}
        train = {"steps": STEPS, "batch": 10, "log_every_steps": 10, "save_every_steps": 50}
        with Driver(place, train, nodes.environment, "Slow", **cluster) as driver:
            settle(driver, 2, config)
            for _ in range(config.repeats):
                worker, *_ = [*workers(second.pid), *workers(first.pid)]
                measured["worker"].append(after(driver, worker.kill))
                settle(driver, 2, config)
                measured["node"].append(after(driver, functools.partial(os.killpg, second.pid, signal.SIGKILL)))
                settle(driver, 1, config)
                second = nodes.add(1, cpus=2)  # back when it has joined
                measured["join"].append(after(driver, lambda: None))
                settle(driver, 2, config)
                print(json.dumps({kind: rounds[-1] for kind, rounds in measured.items()}), file=sys.stderr, flush=True)
    medians = {
        kind: {name: round(statistics.median(one[name] for one in rounds), 1) for name in rounds[0]}
        for kind, rounds in measured.items()
    }
    print(json.dumps({"medians": medians, "rounds": measured}))


def after(driver: Driver, fault: Callable[[], None]) -> dict[str, float]:
    """Cause it, and wait until the next group has made a step; seconds."""
    count, at = len(groups(driver.place)), time.time()
    fault()
    driver.wait(lambda: len(groups(driver.place, "first step")) > count + 1, 300)
    ended, begun, stepped = (groups(driver.place, event)[-1]["at"] for event in ("ends", "begins", "first step"))
    return {"all": stepped - at, "seen": ended - at, "places": begun - ended, "start": stepped - begun}


def settle(driver: Driver, size: int, config: Config) -> None:
    """Wait until a group of that size has trained for a while."""

    def trains() -> bool:
        steps = groups(driver.place, "first step")
        lasting = len(steps) > len(groups(driver.place)) and steps[-1]["workers"] == size
        return lasting and time.time() - steps[-1]["at"] > config.settle_seconds

    driver.wait(trains, 300)


def workers(node: int) -> list[psutil.Process]:
    """The training workers of a node."""
    family = psutil.Process(node).children(recursive=True)
    return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]


if __name__ == "__main__":
    main(tyro.cli(Config))
