"""What a worker leaves in a folder while it is at a shard: how many died over it, and where it is just now."""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from infra import storage

ATTEMPTS = "attempts"  # the folder
MAX_ATTEMPTS = 3  # workers may die for many reasons, but when three have died over one shard, the shard is to blame
BEAT_SECONDS = 10  # after which a worker that is still at a shard says where it is, again and again
MAX_TOLD = 3  # of the shards that are at work when none ends
OURS = f"{Path(__file__).parents[1]}/"


class SpentError(RuntimeError):
    """Too many processes died over an item for another to be risked."""


class Attempt:
    """Leaves a count behind if the process dies in its body; SpentError where too many have."""

    def __init__(self, out: str, item: str, every: float = BEAT_SECONDS) -> None:
        self._url, self._every = storage.join(out, ATTEMPTS, item), every
        try:
            died = storage.read_json(self._url)["attempts"]
        except FileNotFoundError:
            died = 0
        if died >= MAX_ATTEMPTS:
            raise SpentError(f"{died} workers died over it, perhaps for want of memory")
        self.number = died + 1
        self._told = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
        self._stop, self._lock, self._worker = threading.Event(), threading.Lock(), threading.get_ident()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)

    def __enter__(self) -> "Attempt":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()  # what is written after the attempt's end would count as one
        if kind is None or issubclass(kind, Exception):  # which is told: the process lives
            storage.remove(self._url)

    def advanced(self) -> None:
        """Something was committed: those that died before died over that."""
        if self.number > 1:
            self.number = 1
            self._write()

    def _beat(self) -> None:
        """Write now and then where the worker is, so that a driver that hears of no shard can say why."""
        while not self._stop.wait(self._every):
            frame = sys._current_frames().get(self._worker)
            with suppress(Exception):
                self._write(beat=time.time(), doing=place_in(frame))

    def _write(self, **more: Any) -> None:
        with self._lock:
            storage.write_json(self._url, {"attempts": self.number, **self._told, **more})


def place_in(frame: FrameType | None) -> str:
    """Where a thread is: the last place in this package, whom it called from there, and where that has got to."""
    stack = traceback.extract_stack(frame) if frame else []
    last = max((number for number, each in enumerate(stack) if each.filename.startswith(OURS)), default=-1)
    places = [stack[number] for number in sorted({max(last, 0), last + 1, len(stack) - 1}) if number < len(stack)]
    return " > ".join(f"{storage.name(each.filename)}:{each.lineno} {each.name}" for each in places)


def at_work(out: str, cpus: float, gpus: float) -> str:
    """What the workers are at, by what they left: asked when no shard ends."""
    folder, now = storage.join(out, ATTEMPTS), time.time()
    items = storage.list_names(folder)
    told = []
    for item in items[:MAX_TOLD]:
        with suppress(FileNotFoundError):  # it ended meanwhile
            told.append(_doing(item, storage.read_json(storage.join(folder, item)), now))
    if not told:
        asks = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        return f"no worker is at a shard, and each asks for {asks}"
    return "; ".join(told) + (f"; {len(items) - MAX_TOLD} more shards are at work" if len(items) > MAX_TOLD else "")


def _doing(item: str, attempt: Mapping[str, Any], now: float) -> str:
    who = f"shard {item} is with process {attempt['process']} on {attempt['host']} for {now - attempt['since']:.0f} s"
    quiet = now - attempt.get("beat", attempt["since"])
    if quiet > 3 * BEAT_SECONDS:
        return f"{who}, which says nothing for {quiet:.0f} s"
    return f"{who}, at {attempt['doing']}" if attempt.get("doing") else who
