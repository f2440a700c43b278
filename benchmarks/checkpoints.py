"""What a checkpoint costs: seconds that training loses by one, in the background and not, seconds to save and to load.

    python -m benchmarks.checkpoints --millions 1 10 100 --places local --workers 1 2
    python -m benchmarks.checkpoints --millions 1 10 --places s3

The state is that of a real `ZeroEngine` after one step: weights, two moments and an average in fp32, 16 bytes a
parameter, in tensors of at most a million elements. Each worker (a process; two meet over gloo) makes steps of matrix
products, and has three intervals of as many steps in turns, `rounds` times: with no save, with one that it waits for,
and with one in the background, waited for at the end of the interval. A save begins as in the loop, with
`engine.state()` in the thread that trains, which puts this worker's share together: at stages 1 and 2 a copy, and a sum
over workers of what is cut between them; at stage 3 a gather of every tensor of every kind; at stage 0 a copy.

`lost` is by how many seconds the interval is longer than that without a save of the same round; `blocked` is how long
the loop stood still in the save alone, which in the background is `engine.state()` and the start of a thread. Both are
medians of five intervals (`rounds`), and so is `interval`, that without a save. `state` is `engine.state()` alone, and
`save` one save with it until it is committed, waited for: medians of three. `check`, the hash of all bytes by
`restore`, and `load`, reading every tensor on every worker, are one run each, soon after the write: what they read lies
in the kernel's memory still. All are those of the slowest worker.

s3 is moto's server in this very machine, which takes its cores from training: what is lost there is more than a real
store takes. Prints a table, what a save of each kind takes of a run that saves at given intervals, and one JSON object.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from infra import storage
from infra.train import checkpoint, world
from infra.train.engine import STATE_KEYS, Engine
from infra.train.optim import OptimConfig
from infra.train.task import Batch, Losses, Update
from infra.train.writer import Writer

ROOT = Path(__file__).parents[1]
MILLION = 10**6
INTERVALS = (60, 300, 1800)  # seconds between two saves


@dataclass(frozen=True, kw_only=True)
class Config:
    millions: tuple[float, ...] = (1, 10, 100)  # of parameters
    places: tuple[Literal["local", "s3"], ...] = ("local", "s3")
    workers: tuple[int, ...] = (1, 2)
    stages: tuple[int, ...] = (2,)  # of ZeRO
    rounds: int = 5
    least: float = 2.0  # seconds of an interval without a save; three times a save, where that is more
    folder: str = ""  # for local checkpoints; none: a temporary one


class Tensors(torch.nn.Module):
    """So many parameters, as many tensors for each worker to keep, and a loss that reaches all of them."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        count = world.size() * -(-elements // (world.size() * MILLION))
        cuts = [elements * (at + 1) // count - elements * at // count for at in range(count)]
        self.tensors = torch.nn.ParameterList(torch.randn(cut) for cut in cuts)

    def forward(self, batch: Batch) -> Losses:
        return {"loss": torch.stack([tensor.square().mean() for tensor in self.tensors]).sum() * batch["weight"].sum()}


def trained(elements: int, stage: int) -> Engine:
    """An engine of so many parameters after one step, which makes moments and average."""
    from infra.train import zero

    zero.start("gloo", timeout_seconds=1800)
    update = Update("model", Tensors(elements), OptimConfig(ema_decay=0.999))
    engine = zero.ZeroEngine(update, 1, None, stage=stage, precision="fp32", micro_batch=1)
    engine.backward(engine({"weight": torch.ones(1)})["loss"] / world.size())
    engine.step(1e-4)
    held = sum(world.gather(sum(tensor.numel() for tensor in engine.state().values())))
    assert held == (1 + len(STATE_KEYS)) * elements, (held, elements)
    return engine


def timed(work: Callable[[], Any]) -> float:
    """Seconds of `work`, of the slowest worker, all beginning together."""
    world.gather(None)
    begun = time.perf_counter()
    work()
    return max(world.gather(time.perf_counter() - begun))


class Training:
    """Steps of some 20 ms, and intervals of them."""

    def __init__(self, engine: Engine) -> None:
        self.number = 0  # of the last save
        self._engine = engine
        self._x = torch.randn(256, 256)
        self._step()
        begun = time.perf_counter()
        self._step(100)
        self._products = max(1, world.from_first(int(2.0 / (time.perf_counter() - begun))))

    def _step(self, products: int = 1) -> None:
        for _ in range(products):
            self._x = torch.tanh(self._x @ self._x)
        world.total(self._x.sum())

    def save(self, writer: Writer) -> None:
        """Begin one save; without a background, until this worker's part has ended and, on rank 0, until it counts."""
        self.number += 1
        writer.save(self.number, self._engine.state(), {}, None)

    def interval(self, steps: int, writer: Writer | None) -> tuple[float, float]:
        """Seconds of all of it, and seconds in which the loop stood still for the save."""
        blocked = 0.0

        def run() -> None:
            nonlocal blocked
            if writer is not None:
                begun = time.perf_counter()
                self.save(writer)
                blocked = time.perf_counter() - begun
            for _ in range(steps):
                self._step(self._products)
            if writer is not None:
                writer.wait()

        seconds = timed(run)
        return seconds, max(world.gather(blocked))


def work(millions: float, stage: int, folder: str, rounds: int, least: float) -> dict[str, Any]:
    """The part of a worker."""
    torch.manual_seed(0)
    engine = trained(int(millions * MILLION), stage)
    training = Training(engine)
    writers = {"wait": Writer(folder, background=False), "background": Writer(folder)}
    state = statistics.median([timed(engine.state) for _ in range(3)])
    save = statistics.median([timed(lambda: training.save(writers["wait"])) for _ in range(3)])
    second = training.interval(10, None)[0] / 10
    steps = world.from_first(round(max(least, 3 * save) / second))
    whole: dict[str, list[float]] = {"none": [], "wait": [], "background": []}
    blocked: dict[str, list[float]] = {kind: [] for kind in whole}
    for turn in range(rounds):
        order = list(whole)[turn % 3 :] + list(whole)[: turn % 3]
        for kind in order:
            seconds, still = training.interval(steps, writers.get(kind))
            whole[kind].append(seconds)
            blocked[kind].append(still)
    for writer in writers.values():
        writer.close()

    def load() -> None:
        saved = checkpoint.Checkpoint(checkpoint.place(folder, training.number))
        for name in saved.names:
            saved[name].sum()

    check = timed(lambda: checkpoint.restore(folder))
    lost = {kind: statistics.median(map(float.__sub__, whole[kind], whole["none"])) for kind in writers}
    return {
        "interval": statistics.median(whole["none"]),
        "state": state,
        "save": save,
        "check": check,
        "load": timed(load),
        **{f"lost_{kind}": lost[kind] for kind in writers},
        **{f"blocked_{kind}": statistics.median(blocked[kind]) for kind in writers},
    }


@contextmanager
def place_of(kind: str, folder: str):
    """An empty folder, and what its users have to have in their environment."""
    if kind == "local":
        with tempfile.TemporaryDirectory(dir=folder or None) as place:
            yield place, {}
        return
    import logging

    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    os.environ.update(environment)
    s3fs.S3FileSystem(endpoint_url=environment["AWS_ENDPOINT_URL"]).mkdir(bucket := f"checkpoints-{port}")
    try:
        yield f"s3://{bucket}/run", environment
    finally:
        storage.remove(f"s3://{bucket}/run")  # the server keeps it in memory
        server.stop()


def measure(config: Config, millions: float, kind: str, workers: int, stage: int) -> dict[str, Any]:
    """The figures of one case, from fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with place_of(kind, config.folder) as (folder, told):
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers)), "PYTHONWARNINGS": "ignore"}
        group = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group["DS_ACCELERATOR"] = "cpu"
        command = [sys.executable, "-m", "benchmarks.checkpoints", "work", folder]
        command += map(str, (millions, stage, config.rounds, config.least))
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | told | threads | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(workers)
        ]
        try:
            printed = [process.communicate()[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes)
    figures = json.loads(printed[0].splitlines()[-1])
    figures = {name: round(value, 4) for name, value in figures.items()}
    case = {"millions": millions, "megabytes": 16 * millions, "place": kind, "workers": workers, "stage": stage}
    return case | figures


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(results[0]) + " |", "|---" * len(results[0]) + "|"]
    lines += [
        "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()) + " |" for r in results
    ]
    return "\n".join(lines)


def overhead(result: dict[str, Any]) -> dict[str, Any]:
    """Percent of a run's time that saving takes at an interval, from the seconds that one save loses."""
    percent = {
        f"{kind}_every_{seconds}_s": round(100 * max(0.0, result[f"lost_{kind}"]) / seconds, 3)
        for kind in ("wait", "background")
        for seconds in INTERVALS
    }
    return {name: result[name] for name in ("millions", "place", "workers", "stage")} | percent


def main(config: Config) -> None:
    results = []
    for kind in config.places:
        for workers in config.workers:
            for stage in config.stages:
                for millions in config.millions:
                    results.append(measure(config, millions, kind, workers, stage))
                    print(results[-1], file=sys.stderr, flush=True)
    shares = [overhead(result) for result in results]
    print(table(results), table(shares), json.dumps({"results": results, "overhead": shares}), sep="\n\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        folder, millions, stage, rounds, least = sys.argv[2:]
        figures = work(float(millions), int(stage), folder, int(rounds), float(least))
        if world.rank() == 0:
            print(json.dumps(figures), flush=True)
        world.gather(None)
        sys.stdout.flush()
        os._exit(0)  # gloo sometimes aborts while it is torn down
    else:
        main(tyro.cli(Config))
