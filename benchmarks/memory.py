"""Memory of a training worker by ZeRO stage and number of workers, measured, beside the formula of the paper.

    python -m benchmarks.memory
    python -m benchmarks.memory --confirm

Real workers train a prior of the given size over gloo for three steps, on one short row each, so that what they hold is
the state of the model. `resident` is what a worker's resident set has grown by since before the model was built,
`peak` is the most that it grew by in the second and third step, both of the worker that has most. `whole` is the most
that the workers ever held, added up: of each in its whole life, with all that a process holds, so that building the
model, DeepSpeed's start and the first step, which `peak` leaves out, are in it. `formula` is section 5 of
arXiv 1910.02054 for our fp32 training: 4 bytes a parameter for weights, 4 for gradients and 12 for the optimizer's
state (two moments and the moving average), of which stage 1 divides the last by the number of workers, stage 2 the last
two and stage 3 all. After a step no gradients are held, so `resident` may lie below it; DeepSpeed holds a second copy
of a worker's own weights at stages 1 and 2 and buckets of gradients; a step of AdamW takes copies of a worker's own
weights while it lasts.

`largest` is the largest prior whose two workers fit in `--memory` GB together, processes and all, in their whole life,
by the bytes of `whole` a parameter between two depths. `--confirm` trains it, smaller ones where it does not fit and
larger ones until one does not, and prints the `whole` of the largest that did, a run of minutes. `estimates` is what
DeepSpeed's own estimators say for GPUs: 16-bit weights and no moving average. Prints a table and one JSON object; GB
are 10**9 bytes.
"""

import ctypes
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

GB = 1e9
WIDE = 1536  # width of the largest priors; a layer of it has 28 million parameters


@dataclass(frozen=True, kw_only=True)
class Config:
    stages: tuple[int, ...] = (0, 1, 2, 3)
    workers: tuple[int, ...] = (1, 2, 4)
    width: int = 640
    layers: int = 12  # 12 * width ** 2 parameters each
    memory: float = 20  # GB of two workers
    gpus: int = 8  # of one node, for the estimates
    confirm: bool = False  # train the largest priors


@dataclass(frozen=True)
class Case:
    """One training to measure."""

    stage: int
    workers: int
    width: int
    layers: int


def formula(stage: int, workers: int, parameters: int) -> float:
    """Bytes a worker by arXiv 1910.02054, section 5, in fp32 and with a moving average."""
    weights, gradients, optimizer = (4 * parameters, 4 * parameters, 12 * parameters)
    return (
        weights / (workers if stage >= 3 else 1)
        + gradients / (workers if stage >= 2 else 1)
        + optimizer / (workers if stage >= 1 else 1)
    )


def build(width: int, layers: int) -> Any:
    """A prior of so many layers over a small picture."""
    from t2i.conditions.words import WordsConfig
    from t2i.priors.autoregressive import AutoregressiveConfig
    from t2i.protocol import Space

    config = AutoregressiveConfig(width=width, layers=layers, heads=width // 64)
    return config.build(Space((2, 2), codes=2048), (WordsConfig(vocabulary_size=2048, length=8),))


def work(case: Case, out: str) -> None:
    """One worker: train for three steps, and write what it held."""
    import torch

    from infra.train import world, zero
    from infra.train.optim import OptimConfig
    from infra.train.task import Update

    torch.set_num_threads(1)
    zero.start("gloo", timeout_seconds=1800)
    zero.ZeroEngine(
        Update("warm", torch.nn.Linear(2, 2), OptimConfig()), 1, None, stage=case.stage, precision="fp32", micro_batch=1
    )  # what the libraries take once
    before = resident()
    torch.manual_seed(0)
    update = Update("prior", build(case.width, case.layers), OptimConfig(ema_decay=0.999))
    parameters = sum(parameter.numel() for parameter in update.module.parameters())
    engine = zero.ZeroEngine(update, 1, None, stage=case.stage, precision="fp32", micro_batch=1)
    batch = {
        "text": torch.randint(1, 2048, (1, 8)),
        "values": torch.randint(2048, (1, 4)),
        "weight": torch.ones(1),
    }
    first = 0
    for step in range(3):
        if step == 1:
            first = highest()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again: the first step makes the state
        engine.backward(engine(batch)["codes"] / world.size())
        engine.step(1e-4)
    peak = highest()
    figures = {
        "parameters": parameters,
        "before": before,
        "resident": resident() - before,
        "peak": peak - before,
        "whole": max(first, peak),
    }
    gathered = world.gather(figures)
    if world.rank() == 0:
        Path(out).write_text(json.dumps(gathered))
    world.gather(None)
    os._exit(0)  # gloo sometimes aborts while it is torn down


def resident() -> int:
    """Bytes of this process that lie in memory, without what was freed but not handed back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def highest() -> int:
    """The most bytes of this process that lay in memory since that was last forgotten."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(case: Case) -> dict[str, Any]:
    """The figures of one training, those of the worker that held most."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ, "WORLD_SIZE": str(case.workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/figures.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "work", json.dumps(asdict(case)), out]
        workers = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(case.workers)
        ]
        try:
            for worker in workers:
                if worker.wait():
                    raise RuntimeError(f"A worker ended with {worker.returncode}: {case}")
        finally:
            for worker in workers:
                worker.kill()
        figures = json.loads(Path(out).read_text())
    most = {name: max(one[name] for one in figures) for name in figures[0]}
    bytes_each = {name: round(most[name] / most["parameters"], 1) for name in ("resident", "peak")}
    return {
        **asdict(case),
        "parameters": most["parameters"],
        "formula_gb": round(formula(case.stage, case.workers, most["parameters"]) / GB, 3),
        "resident_gb": round(most["resident"] / GB, 3),
        "peak_gb": round(most["peak"] / GB, 3),
        "formula_bytes": round(formula(case.stage, case.workers, 1), 1),
        "resident_bytes": bytes_each["resident"],
        "peak_bytes": bytes_each["peak"],
        "process_gb": round(most["before"] / GB, 3),
        "whole_gb": round(sum(one["whole"] for one in figures) / GB, 3),
    }


def largest(stage: int, config: Config, deep: dict[str, Any] | None) -> dict[str, Any]:
    """The deepest prior of width `WIDE` that two workers train in `config.memory`, by two measured depths."""
    deep = deep or measure(Case(stage, 2, config.width, config.layers))
    shallow = measure(Case(stage, 2, config.width, config.layers // 2))
    slope = (deep["whole_gb"] - shallow["whole_gb"]) / (deep["parameters"] - shallow["parameters"])  # of both workers
    fixed = max(2 * deep["process_gb"], deep["whole_gb"] - slope * deep["parameters"])
    fits = (config.memory - fixed) / slope
    layers = int((fits - sizes(1)[0] + sizes(1)[1]) / sizes(1)[1])
    found = {
        "stage": stage,
        "whole_bytes_a_parameter": round(slope * GB / 2, 1),  # a worker
        "formula_bytes_a_parameter": formula(stage, 2, 1),
        "layers": layers,
        "parameters": sizes(layers)[0],
    }
    if config.confirm:
        most, held = confirmed(stage, layers, config.memory)
        found |= {"trained_layers": most, "trained_parameters": sizes(most)[0], "trained_whole_gb": held}
    return found


def confirmed(stage: int, layers: int, memory: float) -> tuple[int, float]:
    """The deepest prior that two workers trained in `memory`, tried from `layers` on, and the GB that they held."""
    held = {layers: whole(stage, layers)}
    while held[layers] > memory:
        layers -= 1
        held[layers] = whole(stage, layers)
    while layers + 1 not in held and (more := whole(stage, layers + 1)) <= memory:
        layers += 1
        held[layers] = more
    return layers, held[layers]


def whole(stage: int, layers: int) -> float:
    """GB that both workers of a prior of width `WIDE` ever held."""
    return measure(Case(stage, 2, WIDE, layers))["whole_gb"]


def sizes(layers: int) -> tuple[int, int]:
    """Parameters of a prior of width `WIDE`, and of one of its layers; nothing is allocated."""
    import torch

    with torch.device("meta"):
        one, two = (sum(p.numel() for p in build(WIDE, depth).parameters()) for depth in (1, 2))
    return one + (layers - 1) * (two - one), two - one


def estimates(parameters: int, layer: int, gpus: int) -> list[dict[str, Any]]:
    """DeepSpeed's own, in GB: of one GPU, and of the node's memory, with and without offload."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as third
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as second

    found = []
    for offload in ("none", "optimizer"):
        cpu, gpu = second(parameters, gpus, 1, cpu_offload=offload != "none")
        found.append((2, offload, cpu, gpu))
    for offload in ("none", "optimizer", "parameters"):
        cpu, gpu, _ = third(
            parameters, layer, gpus, 1, cpu_offload=offload != "none", cpu_offload_params=offload == "parameters",
            zero_init=False,
        )  # fmt: skip
        found.append((3, offload, cpu, gpu))
    return [
        {"stage": stage, "offload": offload, "gpus": gpus, "gpu_gb": round(gpu / GB, 2), "node_gb": round(cpu / GB, 2)}
        for stage, offload, cpu, gpu in found
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of figures as lines of text, a column a name."""
    names = list(rows[0])
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main(config: Config) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    runs = []
    for stage in config.stages:
        for workers in config.workers:
            runs.append(measure(Case(stage, workers, config.width, config.layers)))
            print(table(runs[-1:]), file=sys.stderr)
    deep = {run["stage"]: run for run in runs if run["workers"] == 2}
    found = [largest(stage, config, deep.get(stage)) for stage in config.stages]
    told = [row for size in (runs[0]["parameters"], 10**9) for row in estimates(size, 12 * WIDE**2, config.gpus)]
    print(table(runs), table(found), sep="\n\n")
    print(json.dumps({"runs": runs, "largest": found, "estimates": told}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Case(**json.loads(sys.argv[2])), sys.argv[3])
    else:
        main(tyro.cli(Config))
