"""What do commands that are asked in passing cost, in CPU-seconds of their whole process?

    python -m benchmarks.quick
    python -m benchmarks.quick --root ../another/checkout

User and system time, since a busy machine changes the seconds on the wall, and the least of some runs, since it changes
the others, too. `import torch` is measured beside: what it takes says how fast the machine is just now.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

LINES = (
    "--version",
    "--help",
    "run --help",
    "list",
    "plan demo",
    "show demo",
    "list models",
    "show model mar_b",
)


@dataclass(frozen=True)
class Config:
    root: str = "."  # of the checkout whose commands are measured
    runs: int = 5


def seconds(root: Path, folder: str, *arguments: str) -> float:
    """Of one process of this Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    config = tyro.cli(Config)
    asked = {"import torch": ["-c", "import torch"]}
    asked |= {f"rescribe {line}": ["-m", "workflows", *line.split()] for line in LINES}
    found: dict[str, list[float]] = {name: [] for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.runs + 1):  # the first one warms
            for name, arguments in asked.items():
                found[name].append(seconds(Path(config.root).absolute(), folder, *arguments))
    print(json.dumps({name: round(min(each[1:]), 2) for name, each in found.items()}, indent=2))


if __name__ == "__main__":
    main()
