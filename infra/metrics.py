"""What a run tells while it runs: progress on standard error, scalars as JSONL and TensorBoard, and memory."""

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import psutil

from infra import storage

Report = Callable[..., None]
"""`report(done, total, unit, **figures)`, called as often as one likes."""


class Progress:
    """One line a step: how far, how fast, how long to go; it moves in a terminal, a log gets one every few seconds."""

    def __init__(self, title: str, stream: TextIO = sys.stderr, every_seconds: float = 10) -> None:
        self._title, self._stream = title, stream
        self._every = 0.2 if stream.isatty() else every_seconds
        self._started = self._printed = time.monotonic()
        self._first, self._last = 0, -1
        self._width = 0

    def __call__(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Tell that `done` of `total` are finished; what was finished before the first call does not count as speed.

        A step may count anew, as one that trains twice does.
        """
        now = time.monotonic()
        if done == self._last:
            return
        if self._last < 0 or done < self._last:
            self._first, self._started = done, now
        self._last = done
        if now - self._printed < self._every and done < total:
            return
        self._printed = now
        self._write(f"{self._title}  {done:,}/{total:,} {unit}{self._speed(done, total, unit, now)}{_figures(figures)}")

    def close(self, text: str) -> None:
        """Say how it ended."""
        self._write(f"{self._title}  {text}", end="\n")

    def _speed(self, done: int, total: int, unit: str, now: float) -> str:
        seconds = now - self._started
        rate = (done - self._first) / seconds if seconds > 0.5 else 0.0
        if rate <= 0:
            return ""
        return f"  {rate:,.1f} {unit}/s  {_duration((total - done) / rate)} left"

    def _write(self, line: str, end: str = "") -> None:
        if self._stream.isatty():
            padding = " " * max(0, self._width - len(line))
            self._stream.write(f"\r{line}{padding}{end}")
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


class ScalarLog:
    """`metrics.jsonl` (one object a logged step) and TensorBoard events in a folder; continued where a run was cut."""

    def __init__(self, folder: str, resume_step: int) -> None:
        self._url = storage.join(folder, "metrics.jsonl")
        self._folder = folder
        kept = [row for row in read_scalars(folder) if row["step"] <= resume_step]
        self._lines = [json.dumps(row) for row in kept]
        self._offset = kept[-1]["seconds"] if kept else 0.0
        self._started = time.monotonic()
        self._saved = 0.0
        self._local = tempfile.mkdtemp(prefix="tensorboard-")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a training worker needs it

        self._board = SummaryWriter(self._local, purge_step=resume_step + 1)

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Log `figures` under training step `step`."""
        seconds = round(self._offset + time.monotonic() - self._started, 3)
        row = {"step": step, "seconds": seconds, **{name: float(f"{value:.6g}") for name, value in figures.items()}}
        self._lines.append(json.dumps(row))
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        every = 1.0 if storage.is_local(self._url) else 15.0  # an object store has no append: the file is written anew
        if time.monotonic() - self._saved > every:
            self.flush()

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._board.close()
        storage.upload(self._local, storage.join(self._folder, "tensorboard"))
        shutil.rmtree(self._local, ignore_errors=True)

    def flush(self) -> None:
        """Write all that was logged."""
        storage.write_bytes(self._url, ("\n".join(self._lines) + "\n").encode())
        self._saved = time.monotonic()


def read_scalars(folder: str) -> list[dict[str, Any]]:
    """The rows of a folder's `metrics.jsonl`; none where there is no such file yet."""
    try:
        text = storage.read_bytes(storage.join(folder, "metrics.jsonl")).decode()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line]


class MemoryWatch:
    """The peak memory of this process and all that it started, shared pages counted once (Linux)."""

    def __init__(self, every_seconds: float = 1.0) -> None:
        self.peak_gb = 0.0
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_gb = max(self.peak_gb, _memory_gb())
            if self._stop.wait(self._every):
                return


def _memory_gb() -> float:
    """Memory of this process and its descendants now, in GB (10^9 bytes).

    Private pages are summed; of shared ones (libraries, Ray's object store) the process that maps most stands for all.
    The kernel's own account (PSS) agrees within 2 %, but reading it stops each process for milliseconds.
    """
    try:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    except psutil.Error:
        return 0.0
    resident = [_resident(process.pid) for process in family]
    private = sum(one.get("RssAnon", 0) for one in resident)
    shared = sum(max(one.get(kind, 0) for one in resident) for kind in ("RssFile", "RssShmem"))
    return (private + shared) * 1024 / 1e9


def _resident(pid: int) -> dict[str, int]:
    """Resident kilobytes of a process by kind; nothing where it has gone, or the system does not say."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            pairs = (line.split(":", 1) for line in lines if line.startswith("Rss"))
            return {name: int(value.split()[0]) for name, value in pairs}
    except OSError:
        return {}


def _figures(figures: dict[str, float]) -> str:
    return "".join(f"  {name} {value:{',' if isinstance(value, int) else ',.4g'}}" for name, value in figures.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
