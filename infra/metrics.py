"""What a run tells while it runs: progress on standard error, scalars as JSONL and TensorBoard; all of it as gauges."""

import contextlib
import json
import math
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from infra import storage, strict
from infra.gauges import Gauges

if TYPE_CHECKING:
    import numpy as np

LOOK_SECONDS = 1.0  # between two looks of the thread that watches a step
FIRST_LINES, FIRST_SECONDS, LOG_SECONDS = 3, 10.0, 60.0  # a log gets a few lines soon, then one a minute
WINDOW_SECONDS, MOST_COUNTS = 60.0, 512  # of rates
HELD_OUT = "held_out"  # the folder, beside a training's scalars, of those of rows that it is not trained on,
PICTURES, PROMPTS = "pictures", "prompts.json"  # and in it: a PNG a step, pictures side by side; what they were to show
SPARE = 50  # times that a write of the scalars took, until the next: they take a fiftieth of a training at most

FLOPS = ("training_flops", "frozen_flops")  # of a step's summary: of what it trained, and of frozen models it asked

Report = Callable[..., None]
"""`report(done, total, unit, why=None, **figures)`, called as often as one likes (`Progress`)."""


class Progress:
    """One line a step: how far, how fast, how long to go; it moves in a terminal, a log gets one about once a minute.

    In a `with` block it is watched: where nothing is reported the line comes all the same, where nothing moves it says
    for how long and what is known of why, and what is reported becomes Prometheus gauges (`infra/gauges.py`).
    """

    def __init__(
        self, title: str, stream: TextIO | None = None, gauges: Gauges | None = None, stall_seconds: float = 100
    ) -> None:
        self._title, self._stream, self._gauges = title, stream or sys.stderr, gauges
        self._patience = stall_seconds / 2
        self._started = self._printed = self._moved = time.monotonic()
        self._first, self._last = 0, -1
        self._lines, self._said, self._width = 0, 0.0, 0
        self._slowest = 0.0  # seconds between two counts
        self._told: tuple[int, int, str, dict[str, float]] = (0, 0, "", {})
        self._why: Callable[[], str] | None = None
        self._counts = _Counts()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._moved = self._printed = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)  # it may be asking a Ray that is gone
        if self._gauges is not None:
            self._gauges.close()

    def __call__(
        self, done: int, total: int, unit: str, why: Callable[[], str] | None = None, **figures: float
    ) -> None:
        """Tell that `done` of `total` are finished; what was finished before the first call does not count as speed.

        A step may count anew, as one that trains twice does. Whole numbers among the figures are counts. `why()` is
        asked, in another thread, for a sentence on what it is at when nothing moves.
        """
        now = time.monotonic()
        with self._lock:
            self._told, self._why = (done, total, unit, figures), why
            self._counts.add(now, {"done": done} | {k: v for k, v in figures.items() if isinstance(v, int)})
            if done == self._last:
                return
            if self._last < 0 or done < self._last:
                self._first, self._started = done, now
            elif self._last > self._first:
                self._slowest = max(self._slowest, now - self._moved)
            self._last, self._moved, self._said = done, now, 0.0
            if now - self._printed >= self._every() or done >= total:
                self._print(now)

    def note(self, text: str) -> None:
        """Say something beside, in a line of its own."""
        with self._lock:
            self._write(f"{self._title}  {text}", end="\n")

    def close(self, text: str) -> None:
        """Say how it ended."""
        self._stop.set()
        with self._lock:
            self._write(f"{self._title}  {text}", end="\n")

    def look(self) -> None:
        """What is to be told each second, whether anything was reported or not."""
        now = time.monotonic()
        with self._lock:
            (done, total, unit, figures), quiet = self._told, now - self._moved
            stalled = quiet > max(self._patience, 3 * self._slowest) and (done < total or not total)
            due = now - self._printed >= self._every()
            if due and not stalled and total and not self._stream.isatty():
                self._print(now)
            rates = self._counts.rates(now)
        if self._gauges is not None and total:
            # Losses are told where they are logged, step by step.
            plain = {name: value for name, value in figures.items() if "/" not in name}
            counted = {"done": done, "total": total, "queued": total - done, "stalled_seconds": quiet}
            self._gauges(plain | counted | rates, unit)
        if stalled and (not self._said or now - self._said >= LOG_SECONDS):
            self._said = now
            if total:
                told = [_far(done, total, unit), f"no progress for {duration(quiet)}: {self._cause()}"]
            else:  # a model loads, or actors start
                told = [f"under way for {duration(quiet)}, nothing is counted yet", self._known()]
            line = "  ".join(filter(None, [self._title, *told]))
            with self._lock:
                self._printed = now
                self._write(line, end="\n")

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            with contextlib.suppress(Exception):  # a stream that is closed, a Ray that is gone: the step tells
                self.look()

    def _cause(self) -> str:
        return self._known() or "nothing is known of why"

    def _known(self) -> str:
        known = []
        for ask in (self._why, free_resources):
            with contextlib.suppress(Exception):
                known.append(ask() if ask else "")
        return "; ".join(filter(None, known))

    def _every(self) -> float:
        if self._stream.isatty():
            return 0.2
        return FIRST_SECONDS if self._lines < FIRST_LINES else LOG_SECONDS

    def _print(self, now: float) -> None:
        done, total, unit, told = self._told
        figures = {name: value for name, value in told.items() if name != unit}
        self._printed, self._lines = now, self._lines + 1
        known = [self._speed(done, total, unit, now), *_figures(figures, self._counts.rates(now))]
        self._write("  ".join([self._title, _far(done, total, unit), *filter(None, known)]))

    def _speed(self, done: int, total: int, unit: str, now: float) -> str:
        seconds = now - self._started
        rate = (done - self._first) / seconds if seconds > 0.5 else 0.0
        if rate <= 0:
            return ""
        return f"{_rate(rate, unit)}  {duration((total - done) / rate)} left"

    def _write(self, line: str, end: str = "") -> None:
        if self._stream.isatty():
            padding = " " * max(0, self._width - len(line))
            self._stream.write(f"\r{line}{padding}{end}")
            self._width = 0 if end else len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


class _Counts:
    """How fast counts grow: over the last WINDOW_SECONDS, or since the last but one time that they grew."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, int]]] = deque()

    def add(self, now: float, counts: dict[str, int]) -> None:
        if self._seen and any(counts.get(name, 0) < was for name, was in self._seen[-1][1].items()):
            self._seen.clear()  # it counts anew
        if not self._seen or counts != self._seen[-1][1]:
            self._seen.append((now, counts))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW_SECONDS:
            self._seen.popleft()
        if len(self._seen) > MOST_COUNTS:  # of a step that reports in a hot loop, every other one will do
            self._seen = deque(each for number, each in enumerate(self._seen) if number % 2 == 0)

    def rates(self, now: float) -> dict[str, float]:
        """By name, each with `_per_second` added."""
        if not self._seen:
            return {}
        (since, first), (_, last) = self._seen[0], self._seen[-1]
        seconds = max(now - since, 1e-9)
        return {f"{name}_per_second": (value - first.get(name, 0)) / seconds for name, value in last.items()}


def counting(report: Report, name: str, of: str, times: int) -> Report:
    """A Report that tells a further count: `times` as many as another, where that is told."""

    def told(done: int, total: int, unit: str, **figures: Any) -> None:
        more = {name: times * figures[of]} if of in figures else {}
        report(done, total, unit, **more, **figures)

    return told


def free_resources() -> str:
    """What Ray has free, in words; nothing where Ray is not up."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    free, whole = ray.available_resources(), ray.cluster_resources()
    told = [f"{free.get(kind, 0):g} of {whole[kind]:g} {kind}s" for kind in ("CPU", "GPU") if whole.get(kind)]
    return f"Ray has {' and '.join(told)} free" if told else "Ray has no machine with a CPU"


class ScalarLog:
    """`metrics.jsonl` (one object a logged step) and TensorBoard events in a folder; continued where a run was cut.

    Figures become gauges, too, losses with `gauges` before their names, and go to `tell`, as `infra/track.py` makes it.
    """

    def __init__(
        self,
        folder: str,
        resume_step: int,
        tell: Callable[[int, Mapping[str, float]], None] | None = None,
        gauges: str = "",
    ) -> None:
        self._url = storage.join(folder, "metrics.jsonl")
        self._gauges, self._before, self._tell = Gauges.of_folder(folder), gauges, tell
        kept = [row for row in read_scalars(folder) if row["step"] <= resume_step]
        self._lines = [strict.dumps(row) for row in kept]
        self._offset = kept[-1]["seconds"] if kept else 0.0
        self._started = time.monotonic()
        # The file is written anew each time, since an object store has no append; the longer it takes, the less often.
        self._saved, self._pause = 0.0, 0.0
        self._events, self._sent = storage.join(folder, "tensorboard"), self._started
        near = storage.is_local(folder)  # TensorBoard follows the files as they grow; an object store gets copies
        self._local = storage.absolute(self._events) if near else tempfile.mkdtemp(prefix="tensorboard-")
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a training worker needs it

        self._board = SummaryWriter(self._local, purge_step=resume_step + 1)

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Log `figures` under training step `step`."""
        seconds = round(self._offset + time.monotonic() - self._started, 3)
        row = {"step": step, "seconds": seconds, **{name: float(f"{value:.6g}") for name, value in figures.items()}}
        self._lines.append(strict.dumps(row))
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        self._gauges({self._before + name if "/" in name else name: value for name, value in figures.items()})
        if self._tell:
            self._tell(step, figures)
        if time.monotonic() - self._saved > self._pause:
            self.flush()

    def show(self, step: int, pictures: "Mapping[str, np.ndarray]") -> None:
        """Pictures (H, W, 3) uint8 by name, for TensorBoard alone."""
        for name, picture in pictures.items():
            self._board.add_image(f"pictures/{name}", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._board.close()
        self._gauges.close()
        self._sent = -math.inf
        self.flush()
        if not storage.is_local(self._url):
            shutil.rmtree(self._local, ignore_errors=True)

    def flush(self) -> None:
        """Write all that was logged."""
        began = time.monotonic()
        storage.write_bytes(self._url, ("\n".join(self._lines) + "\n").encode())
        self._board.flush()
        self._saved = time.monotonic()
        self._pause = max(1.0 if storage.is_local(self._url) else 15.0, SPARE * (self._saved - began))
        if not storage.is_local(self._url) and self._saved - self._sent > LOG_SECONDS:
            storage.upload(self._local, self._events)
            self._sent = self._saved


def read_scalars(folder: str) -> list[dict[str, Any]]:
    """The rows of a folder's `metrics.jsonl`, NaN for a figure that was no finite number; none without such a file."""
    try:
        text = storage.read_bytes(storage.join(folder, "metrics.jsonl")).decode()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in text.splitlines() if line]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _figures(figures: dict[str, float], rates: dict[str, float]) -> Iterator[str]:
    """Counts and levels; the first count with its rate, since that of the whole step's units may be slow to tell."""
    counts = [name for name, value in figures.items() if isinstance(value, int)]
    for name, value in figures.items():
        told = f"{name} {value:{',' if name in counts else ',.4g'}}"
        rate = rates.get(f"{name}_per_second", 0.0) if name in counts[:1] else 0.0
        yield f"{told} ({rate:,.1f}/s)" if rate > 0 else told


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.1f} {unit}/s" if rate >= 0.1 else f"{60 * rate:,.2g} {unit}/min"


def _far(done: int, total: int, unit: str) -> str:
    return f"{done:,}/{total:,} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
