"""Where a training's workers and its driver meet: workers say how far they are, and learn when to leave."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BEAT_SECONDS = 0.5  # of a worker; the board hears BEATS a second at most
BEATS = 500
BRISK = ("data", "step")  # phases that a worker leaves within a step's time; the others may read or write much

Phase = Literal["start", "data", "step", "save", "export", "done"]
DOING: dict[Phase, str] = {
    "start": "is starting",
    "data": "waits for data",
    "step": "computes",
    "save": "saves",
    "export": "exports",
    "done": "has ended",
}


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a worker stands."""

    rank: int
    node: str = ""  # Ray's id of the machine
    pid: int = field(default_factory=os.getpid)  # 0: the worker has not come in yet
    training: int = 0  # which of the trainings that its group was given
    step: int = 0
    phase: Phase = "start"
    seconds: float = 0.0  # in this phase of this step
    made: int = 0  # steps by this worker in this group
    slowest: float = 0.0  # seconds of computing one, of this training; the first is not counted
    figures: Mapping[str, float] = field(default_factory=dict)  # logged last, by rank 0


class Board:
    """Lives in an actor of its own. A word from a group that is no longer the current one is answered with "leave"."""

    def __init__(self) -> None:
        self._group, self._leave = -1, False
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._handles: dict[int, bytes] = {}
        self._environment = "{}"

    def open(self, group: int, workers: int) -> None:
        """Forget the group before; listen to this one, of so many workers, which are missed from now on."""
        self.__init__()
        self._group = group
        self._beats = {rank: Beat(rank=rank, pid=0) for rank in range(workers)}
        self._heard = dict.fromkeys(self._beats, time.monotonic())

    def hello(self, group: int, rank: int, handle: bytes, environment: str) -> None:
        """A worker comes in: its actor, pickled, by which it can be killed, and Ray's name for its environment."""
        if group == self._group:
            self._handles[rank], self._environment = handle, environment

    def beat(self, group: int, beat: Beat) -> bool:
        """Note where a worker stands; returns whether it is to leave."""
        if group != self._group:
            return True
        self._beats[beat.rank], self._heard[beat.rank] = beat, time.monotonic()
        return self._leave

    def leave(self) -> None:
        """From now on workers are told to save and to leave."""
        self._leave = True

    def read(self) -> list[tuple[Beat, float]]:
        """The last word of each worker, and how many seconds ago it came."""
        now = time.monotonic()
        return [(self._beats[rank], now - self._heard[rank]) for rank in sorted(self._beats)]

    def environment(self) -> str:
        """That of the workers."""
        return self._environment

    def handles(self) -> list[bytes]:
        """The actors of the workers that came in, pickled."""
        return list(self._handles.values())


class Pulse:
    """A worker's side: a thread tells the board, twice a second where few do, where the training thread stands."""

    def __init__(self, rank: int, node: str, tell: Callable[[Beat], bool], workers: int = 1) -> None:
        self._tell, self._every = tell, max(BEAT_SECONDS, workers / BEATS)
        self._place: dict[str, Any] = {"rank": rank, "node": node}
        self._since = time.monotonic()
        self._slowest, self._made, self._warm = 0.0, 0, False
        self._leave = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def at(self, phase: Phase, **place: Any) -> None:
        """The training thread is in `phase`; `place` may hold training or step."""
        now = time.monotonic()
        if self._place.get("phase") == "step":
            self._made += 1
            if self._warm and phase == "data":  # the first one may compile; others end with a save
                self._slowest = max(self._slowest, now - self._since)
            self._warm = True
        if "training" in place:
            self._slowest, self._warm = 0.0, False
            place = {"step": 0, "figures": {}, **place}
        self._place = {**self._place, "phase": phase, **place}
        self._since = now

    def logged(self, figures: Mapping[str, float]) -> None:
        """What the driver is to show."""
        self._place = {**self._place, "figures": figures}

    def leaving(self) -> bool:
        """Whether this worker was told to save and to leave."""
        return self._leave

    def close(self) -> None:
        """Say the last word."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            last = self._stop.is_set()
            seconds = time.monotonic() - self._since
            beat = Beat(**self._place, seconds=seconds, made=self._made, slowest=self._slowest)
            with contextlib.suppress(Exception):  # the board is the driver's; a worker does not mind
                self._leave = self._tell(beat) or self._leave
            if last:
                return
            self._stop.wait(self._every)


def silence(words: list[tuple[Beat, float]], patience: float) -> tuple[str, bool] | None:
    """What is wrong with a group that makes no progress, and whether to give it up; None while all is well.

    A worker may take `patience` seconds for a step, or ten times its slowest one, if that is longer; five times as long
    to come in, start, save or export; and it must not fall silent for `patience` seconds, whatever it does. It is said
    after half.
    """
    worst, worst_of, who = 0.0, None, ""
    for beat, quiet in words:
        brisk = beat.phase in BRISK and beat.slowest > 0
        limit = max(patience, 10 * beat.slowest) if brisk else 5 * patience
        stuck, silent = (beat.seconds + quiet) / limit, quiet / patience if beat.pid else 0.0
        if beat.phase != "done" and max(stuck, silent) > worst:
            worst, worst_of, who = max(stuck, silent), beat, _described(beat, quiet)
    if worst_of is None or worst < 0.5:
        return None
    others = [f"worker {beat.rank} {DOING[beat.phase]}" for beat, _ in words if beat is not worst_of]
    return f"No progress at step {worst_of.step}: {', '.join([who, *others[:3]])}.", worst >= 1


def _described(beat: Beat, quiet: float) -> str:
    """A worker, and what it does for how long."""
    if not beat.pid:
        return f"worker {beat.rank} has not come in for {quiet:.0f} s"
    doing = f"{DOING[beat.phase]} for {beat.seconds + quiet:.0f} s"
    what = f"says nothing for {quiet:.0f} s" if quiet > beat.seconds else doing
    return f"worker {beat.rank} (process {beat.pid}, node {beat.node[:8]}) {what}"
