"""What a checkpoint costs: seconds that training loses by one, in the background and not, seconds to save and to load.

    python -m benchmarks.checkpoints --millions 1 10 100 --places local --workers 1 2
    python -m benchmarks.checkpoints --millions 1 10 --places s3

A state is weights, two moments and an average in fp32: 16 bytes a parameter, in tensors of at most a million elements.
Each worker (a process; two meet over gloo) holds its share of it, makes steps of matrix products, and has three
intervals of as many steps in turns, `rounds` times: with no save, with one that it waits for, and with one in the
background, waited for at the end of the interval. `lost` is by how many seconds the interval is longer than that
without a save of the same round, the copy that training has to give away included; `blocked` is how long the loop
stood still in the save alone. `copy` is that copy, `save` one save until it is committed, `check` the hash of all
bytes by `restore`, `load` reading every tensor on every worker. Medians. s3 is moto's server in this very machine,
which takes its cores from training: what is lost there is more than a real store takes. Prints a table, what a save of
each kind takes of a run that saves at given intervals, and one JSON object.
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
import torch.distributed as dist
import tyro

from infra import storage
from infra.train import checkpoint, world
from infra.train.writer import Writer

ROOT = Path(__file__).parents[1]
KINDS = ("w", "exp_avg", "exp_avg_sq", "ema")
MILLION = 10**6
INTERVALS = (60, 300, 1800)  # seconds between two saves


@dataclass(frozen=True, kw_only=True)
class Config:
    millions: tuple[float, ...] = (1, 10, 100)  # of parameters
    places: tuple[Literal["local", "s3"], ...] = ("local", "s3")
    workers: tuple[int, ...] = (1, 2)
    rounds: int = 5
    least: float = 2.0  # seconds of an interval without a save; three times a save, where that is more
    folder: str = ""  # for local checkpoints; none: a temporary one


def share(millions: float) -> dict[str, torch.Tensor]:
    """This worker's tensors."""
    elements = int(millions * MILLION / world.size())
    cuts = [min(MILLION, elements - start) for start in range(0, elements, MILLION)]
    return {f"{kind}/{world.rank()}/{at}": torch.randn(cut) for at, cut in enumerate(cuts) for kind in KINDS}


def timed(work: Callable[[], Any]) -> float:
    """Seconds of `work`, of the slowest worker, all beginning together."""
    world.gather(None)
    begun = time.perf_counter()
    work()
    return max(world.gather(time.perf_counter() - begun))


class Training:
    """Steps of some 20 ms, and intervals of them."""

    def __init__(self, state: dict[str, torch.Tensor], folder: str) -> None:
        self._state, self._folder, self._number = state, folder, 0
        self._x = torch.randn(256, 256)
        self._step()
        begun = time.perf_counter()
        self._step(100)
        self._products = max(1, world.from_first(int(2.0 / (time.perf_counter() - begun))))

    def _step(self, products: int = 1) -> None:
        for _ in range(products):
            self._x = torch.tanh(self._x @ self._x)
        world.total(self._x.sum())

    def copies(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def saved(self, writer: Writer) -> None:
        """One save, until this worker's part of it has ended; on rank 0 until it counts."""
        self._number += 1
        writer.save(self._number, self.copies(), {}, None)
        writer.wait()

    def interval(self, steps: int, writer: Writer | None) -> tuple[float, float]:
        """Seconds of all of it, and seconds in which the loop stood still for the save."""
        blocked = 0.0

        def run() -> None:
            nonlocal blocked
            if writer is not None:
                begun = time.perf_counter()
                self._number += 1
                writer.save(self._number, self.copies(), {}, None)
                blocked = time.perf_counter() - begun
            for _ in range(steps):
                self._step(self._products)
            if writer is not None:
                writer.wait()

        seconds = timed(run)
        return seconds, max(world.gather(blocked))


def work(millions: float, folder: str, rounds: int, least: float) -> dict[str, Any]:
    """The part of a worker."""
    torch.manual_seed(world.rank())
    state = share(millions)
    training = Training(state, folder)
    writers = {"wait": Writer(folder, background=False), "background": Writer(folder)}
    copy = statistics.median([timed(training.copies) for _ in range(3)])
    save = statistics.median([timed(lambda: training.saved(writers["wait"])) for _ in range(3)])
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
        saved = checkpoint.Checkpoint(checkpoint.place(folder, training._number))
        for name in saved.names:
            saved[name].sum()

    check = timed(lambda: checkpoint.restore(folder))
    lost = {kind: statistics.median(map(float.__sub__, whole[kind], whole["none"])) for kind in writers}
    return {
        "interval": statistics.median(whole["none"]),
        "copy": copy,
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


def measure(config: Config, millions: float, kind: str, workers: int) -> dict[str, Any]:
    """The figures of one case, from fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with place_of(kind, config.folder) as (folder, told):
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers)), "PYTHONWARNINGS": "ignore"}
        group = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "benchmarks.checkpoints", "work", folder]
        command += map(str, (millions, config.rounds, config.least))
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | told | threads | group | {"RANK": str(rank)},
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
    return {"millions": millions, "megabytes": 16 * millions, "place": kind, "workers": workers} | figures


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
    return {name: result[name] for name in ("millions", "place", "workers")} | percent


def main(config: Config) -> None:
    results = []
    for kind in config.places:
        for workers in config.workers:
            for millions in config.millions:
                results.append(measure(config, millions, kind, workers))
                print(results[-1], file=sys.stderr, flush=True)
    shares = [overhead(result) for result in results]
    print(table(results), table(shares), json.dumps({"results": results, "overhead": shares}), sep="\n\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        folder, millions, rounds, least = sys.argv[2:]
        dist.init_process_group("gloo")
        figures = work(float(millions), folder, int(rounds), float(least))
        if world.rank() == 0:
            print(json.dumps(figures), flush=True)
        world.gather(None)
        sys.stdout.flush()
        os._exit(0)  # gloo sometimes aborts while it is torn down
    else:
        main(tyro.cli(Config))
