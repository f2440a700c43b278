"""Does a training come out right, whatever befalls it? Random faults on a small cluster of this machine.

    python -m benchmarks.soak_training --minutes 30 --seed 0

A head and up to two nodes (`benchmarks/nodes.py`), a toy training on 1 to 2 workers whose step takes some 50 ms. Until
the time is over, at random moments: SIGKILL of a worker, of a node or its raylet, a drained node, a node that joins,
SIGTERM or SIGKILL of the driver (and the same line again), a worker that hangs. Then it is left alone until it ends.
Prints one JSON object: the faults, the groups, whether the log of ids shows every row once an epoch, and how far the
logged losses are from those of one undisturbed plain process; and how far those of another are, which sums in another
order, too. Ends with an error where a step or an epoch is missing, or a loss is four times as far off as by that.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import tyro

from benchmarks.nodes import Nodes
from infra.metrics import read_scalars
from infra.train import ids
from infra.train.loop import TrainConfig
from infra.train.plan import BatchPlan
from tests.infra.train import toy
from tests.infra.train.drive import Driver, groups

OFF = "largest_relative_difference_of_a_loss"
ROUNDING = "and_of_one_plain_process_in_two_micro_steps"
LEAST_OFF = 1e-5  # of a loss, relative, that is allowed: the log has six digits
FAULTS = ("worker", "worker twice", "node", "raylet", "drain", "join", "hang", "driver SIGTERM", "driver SIGKILL")


@dataclass(frozen=True, kw_only=True)
class Config:
    minutes: float = 30
    seed: int = 0
    steps_per_minute: int = 240  # of training, faults and all: what is left after the time is trained undisturbed
    pause: tuple[float, float] = (5, 25)  # seconds of training between faults


class Soak:
    """A cluster, a driver, and what is done to them."""

    def __init__(self, config: Config, nodes: Nodes, place: str) -> None:
        self.config, self.nodes, self.place = config, nodes, place
        self.rng = random.Random(config.seed)
        self.done: Counter[str] = Counter()
        self.up: dict[subprocess.Popen[bytes], int] = {}  # nodes, each on a core of its own
        steps = max(100, round(config.steps_per_minute * config.minutes))
        self.train = {"steps": steps, "batch": 10, "log_every_steps": 5, "save_every_steps": 20}
        self.driver = self.start()

    def start(self) -> Driver:
        """A driver; the same line every time."""
        cluster = {
            "workers": (1, 2), "zero_stage": 2, "grow_seconds": 5, "stall_seconds": 20, "log_ids": True,
            "restarts": 5, "address": self.nodes.address,
        }  # fmt: skip
        self.told = len(groups(self.place, None))  # of groups of drivers before
        return Driver(self.place, self.train, self.nodes.environment, "Slow", **cluster).__enter__()

    def run(self) -> float:
        """Seconds until training ended."""
        began = time.monotonic()
        while time.monotonic() - began < 60 * self.config.minutes and self.trains(300):
            time.sleep(self.rng.uniform(*self.config.pause))
            self.fault(self.rng.choice(FAULTS))
        while len(self.up) < 1:
            self.join()
        code, said = self.driver.end(1200)
        assert code == 0, said
        return time.monotonic() - began

    def trains(self, seconds: float) -> bool:
        """Wait until a group trains; False if all is trained. A driver that gave up is an AssertionError."""
        deadline = time.monotonic() + seconds
        while [line["event"] for line in groups(self.place, None)][self.told :][-1:] != ["first step"]:
            if self.driver.process.poll() == 0:
                return False
            if not self.up:
                self.join()
            assert self.driver.process.poll() is None, self.driver.end(5)
            assert time.monotonic() < deadline, groups(self.place, "begins")[-1]
            time.sleep(0.2)
        return self.driver.process.poll() is None

    def fault(self, kind: str) -> None:
        """Cause one, if there is what it befalls."""
        print(f"{time.strftime('%H:%M:%S')} {kind}", file=sys.stderr, flush=True)
        node = self.rng.choice(list(self.up)) if self.up else None
        if kind == "join":
            if len(self.up) == 2:
                return
            self.join()
        elif kind.startswith("driver"):
            sent = signal.SIGTERM if kind.endswith("TERM") else signal.SIGKILL
            self.driver.process.send_signal(sent)
            self.driver.process.communicate(timeout=120)
            if self.driver.process.returncode == 0:
                return  # it had ended
            self.driver = self.start()
        elif node is None:
            return
        elif kind in ("node", "drain"):
            if kind == "drain":
                self.nodes.drain(node)
                time.sleep(self.rng.uniform(2, 8))
            os.killpg(node.pid, signal.SIGKILL)
            del self.up[node]
        elif kind == "raylet":
            for process in family(node.pid):
                if process.name() == "raylet":
                    process.kill()
            del self.up[node]
        else:
            workers = [process for each in self.up for process in family(each.pid) if is_worker(process)]
            if not workers:
                return
            victim = self.rng.choice(workers)
            if kind == "hang":
                victim.suspend()
            else:
                victim.kill()
                if kind == "worker twice":
                    self.trains(300)
                    self.fault("worker")
        self.done[kind] += 1

    def join(self) -> None:
        """A node more, on the core that is free."""
        core = min({0, 1} - {*self.up.values()})
        self.up[self.nodes.add(core, cpus=2)] = core

    def verdict(self) -> dict[str, Any]:
        """What came of it."""
        rows = [row["net/token"] for row in read_scalars(f"{self.place}/out")]
        plain, halved = (self.plain(micro_steps) for micro_steps in (1, 2))
        used = ids.read_ids(f"{self.place}/out/ids")
        each = ids.row_ids([f"{self.place}/rows"], ["000000", "000001"], toy.Toy())
        plan = BatchPlan([len(one) for one in each], 10, 0, TrainConfig(steps=1).window_shards)
        return {
            "steps": len(used),
            "epochs_with_every_row_once": ids.check(used, plan, each),
            OFF: largest(rows, plain),
            ROUNDING: largest(halved, plain),
            "groups": len(groups(self.place, "begins")),
            "ended": Counter(line["why"][:60] for line in groups(self.place)),
        }

    def plain(self, micro_steps: int) -> list[float]:
        """The losses of one undisturbed process."""
        steps = self.train["steps"]
        _, losses = toy.plain(
            f"{self.place}/plain-{micro_steps}", micro_steps=micro_steps, steps=steps, save_every_steps=steps
        )
        return losses[4::5]


def largest(losses: list[float], others: list[float]) -> float:
    """Relative difference of two losses of the same step."""
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_worker(process: psutil.Process) -> bool:
    """Whether it trains."""
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def main(config: Config) -> None:
    """Soak, and print."""
    with tempfile.TemporaryDirectory() as place, Nodes() as nodes:
        toy.write_rows(f"{place}/rows")
        soak = Soak(config, nodes, place)
        try:
            soak.join()
            soak.join()
            seconds = soak.run()
            verdict = soak.verdict()
        finally:
            soak.driver.__exit__()
    print(json.dumps({"seconds": round(seconds), "seed": config.seed, "faults": soak.done, **verdict}), flush=True)
    steps, epochs, off = (verdict[name] for name in ("steps", "epochs_with_every_row_once", OFF))
    most = max(LEAST_OFF, 4 * verdict[ROUNDING])
    wanted = soak.train["steps"]
    assert steps == wanted, f"The log of ids holds {steps} steps of {wanted}."
    whole = wanted * soak.train["batch"] // toy.ROWS
    assert epochs == whole, f"{epochs} epochs used every row once, of {whole}."
    assert off < most, f"A loss is off by {off:.1g}, and by rounding it would be by {most:.1g} at most."


if __name__ == "__main__":
    main(tyro.cli(Config))
