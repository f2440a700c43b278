"""A store of pieces: it notes how far each step was, and what it had taken by then."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from infra import device
from infra.artifact import Step
from infra.metrics import Progress
from infra.spent import CpuWatch
from infra.store import Store
from workflows.estimate import Mark


class Marking(Progress):
    """Progress that notes how far a step was, and what it had taken."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self.marks: list[Mark] = []
        self.watch = CpuWatch()

    def __enter__(self) -> "Marking":
        self.watch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        super().__exit__(*problem)
        self.watch.__exit__(*problem)

    def __call__(self, done: int, total: int, unit: str, why: Any = None, **figures: float) -> None:
        if not self.marks or self.marks[-1].done != done:
            self.marks.append(Mark(done, total, self.watch.lasted(), self.watch.seconds()))
        super().__call__(done, total, unit, why, **figures)


class ScratchStore(Store):
    """A store of pieces."""

    marking: Marking

    def _progress(self, work: Step, identity: str, number: str = "") -> Progress:
        self.marking = Marking(f"probe of {work.name:<15}")
        return self.marking


@contextmanager
def gpu_watch() -> Iterator[list[float]]:
    """The memory that the fullest GPU has in use, in GB, each second; nothing where there is no GPU."""
    found, over = list[float](), threading.Event()

    def look() -> None:
        line = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not over.wait(1.0):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                said = subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout
                found.append(max(float(word) * 2**20 / 1e9 for word in said.split()))

    thread = threading.Thread(target=look, name="gpu", daemon=True)
    if device.has_driver():
        thread.start()
    try:
        yield found
    finally:
        over.set()
