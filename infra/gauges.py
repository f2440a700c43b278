"""What a run tells, as Prometheus gauges: Ray's agent on each machine exports them with a prefix of its own, `ray_`."""

import math
import re
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

PREFIX = "rescribe_"
TELL_SECONDS = 1.0  # between two times that the gauges of a step are set, at least
KEEP_SECONDS = 5.0  # and at most
# What is known by name: its meaning, and the label beside `step` and `artifact` that it may have. A figure that is not
# named here becomes a gauge of its own name.
METRICS: dict[str, tuple[str, str]] = {
    "done": ("Units of a step that are finished", "unit"),
    "total": ("Units that a step has in all", "unit"),
    "queued": ("Units of a step that are not finished", "unit"),
    "done_per_second": ("Units finished a second, of late", "unit"),
    "stalled_seconds": ("Time since a step's count of finished units moved", ""),
    "rows": ("Rows that this call of a step has done", ""),
    "rows_per_second": ("Rows done a second; samples a second where a model is trained", ""),
    "captions": ("Captions that this call of a step has written", ""),
    "captions_per_second": ("Captions written a second", ""),
    "accepted": ("Rows in the ledger that were accepted by this call of a step", ""),
    "rejected": ("Rows in the ledger that were rejected, being unfit", ""),
    "failed": ("Rows in the ledger that failed in some stage", ""),
    "steps_per_second": ("Training steps a second", ""),
    "waiting_share": ("Share of time that the trainer waited for data", ""),
    "prepared_steps": ("Training steps whose batches lie ready for the worker of rank 0", ""),
    "model_flops_per_second": ("Floating point operations of the model a second, over all workers", ""),
    "model_flops_utilization": ("These as a share of what the workers' GPUs could do, dense in bf16", ""),
    "loss": ("Mean of a loss over the targets of a training step", "loss"),
    "lr": ("Learning rate of an update", "update"),
    "grad_norm": ("Norm of the gradient of an update before it is clipped", "update"),
}

_gauges: dict[str, Any] = {}  # Ray's, of this process, by name


class Gauges:
    """The gauges of one step: rates, counts and losses by name, set at most once a second, until `close`.

    Nothing happens where Ray is not up. Names are of the code, never of the data, so that their number is bounded.
    """

    def __init__(self, step: str, artifact: str = "") -> None:
        self._labels = {"step": step, "artifact": artifact}
        self._values: dict[tuple[str, str, str], float] = {}  # by metric, label and its value
        self._set_at = -math.inf

    @staticmethod
    def of_folder(folder: str) -> "Gauges":
        """Of what is made in a folder of an artifact."""
        return Gauges(*place_of(folder)[:2])

    def __call__(self, figures: Mapping[str, float], label: str = "") -> None:
        """Set those that are finite numbers; `label` is the unit of those that have one.

        `codes/lr` is the learning rate of the update `codes`, and `codes/mse` a loss of it.
        """
        finite = {_named(name, label): float(value) for name, value in figures.items() if math.isfinite(value)}
        self._values = self._values | finite
        if time.monotonic() - self._set_at >= TELL_SECONDS:
            _keeper.keep(self)
            self.tell()

    def close(self) -> None:
        """What the step told is no longer so: Ray forgets it in half a minute."""
        _keeper.leave(self)

    def tell(self) -> None:
        """Set all gauges to what was told last."""
        self._set_at = time.monotonic()
        ray = sys.modules.get("ray")  # who has not imported it has no Ray that is up
        if ray is not None and ray.is_initialized():
            for (name, tag, told), value in self._values.items():
                _gauge(name, tag).set(value, tags=self._labels | ({tag: told} if tag else {}))


class _Keeper:
    """Tells gauges again and again, in a thread: Ray forgets one that is not set for two of its reports."""

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[Gauges] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def keep(self, gauges: Gauges) -> None:
        with self._lock:
            self._kept.add(gauges)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="gauges", daemon=True)
                self._thread.start()

    def leave(self, gauges: Gauges) -> None:
        with self._lock:
            self._kept.discard(gauges)

    def _work(self) -> None:
        while True:
            time.sleep(KEEP_SECONDS)
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            kept = list(self._kept)
        for gauges in kept:
            with suppress(Exception):  # Ray may have gone meanwhile
                gauges.tell()


_keeper = _Keeper()


def place_of(folder: str) -> tuple[str, str, str]:
    """Step, artifact and part of `<store>/<step>/<id>[/<part>]`; of another folder its name, and nothing."""
    found = re.search(r"([^/]+)/([0-9a-f]{16}(?:\.\d+)?)(?:/(.+))?$", folder.rstrip("/"))
    return (found[1], found[2], found[3] or "") if found else (folder.rstrip("/").rsplit("/", 1)[-1], "", "")


def _named(figure: str, label: str) -> tuple[str, str, str]:
    """The metric of a figure, its label's name and value."""
    update, _, name = figure.rpartition("/")
    if update and name not in ("lr", "grad_norm"):
        return "loss", "loss", figure
    _, tag = METRICS.get(name, ("", ""))
    return re.sub(r"\W", "_", name), tag, update or label


def _gauge(name: str, tag: str) -> Any:
    if name not in _gauges:
        from ray.util.metrics import Gauge  # the caller has seen that Ray is up

        meaning, _ = METRICS.get(name, ("A figure that a step tells", ""))
        _gauges[name] = Gauge(PREFIX + name, meaning, ("step", "artifact", *([tag] if tag else [])))
    return _gauges[name]
