"""What does the work of `run_shards` in one process: a shard, or some rows of it, at a time; and what such work is."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from infra import storage, strict
from infra.data.attempts import BEAT_SECONDS, Attempt, SpentError
from infra.data.clock import clocked, taken
from infra.data.health import AWAY, BACK, BROKEN, HALT, IDLE, RAISED, SETUP, SPENT, WELL, Place
from infra.data.ledger import Record, commit, inspect
from infra.data.parts import Part, Rows, commit_part, gaps, merge, parts_of, read_item
from infra.data.shards import shard_url
from infra.data.stage import DEVICE, DeviceError, kind_of
from infra.trouble import HaltError

PART_SECONDS = 20  # of work that is not committed; a shard that takes no longer has no parts


class ShardWork(Protocol):
    """A picklable object that makes one shard's table; `setup` is called once in each actor."""

    def setup(self) -> None:
        """Load what all shards need."""
        ...

    def __call__(self, name: str) -> pa.Table:
        """The rows of a shard: sample_id, state, reason and further columns."""
        ...


@runtime_checkable
class PartWork(Protocol):
    """Work whose shards may be done in parts, by several actors, and that knows how many rows there are."""

    batch_size: int

    def setup(self) -> None: ...

    def open(self, name: str) -> "Shard": ...

    def counts(self) -> dict[str, int]:
        """The rows of each shard."""
        ...


class Shard(Protocol):
    """A shard that is to be done in parts; `starts` are the rows, ascending, at which it is best cut."""

    sample_ids: list[str]

    @property
    def starts(self) -> list[int]: ...

    def tables(self, rows: Rows, due: Callable[[], bool]) -> Iterator[tuple[int, pa.Table]]:
        """Do some rows, and yield them in order, each table with the row that it begins with.

        One comes whenever `due`, and one at the end.
        """
        ...

    def written_off(self, rows: Rows, reason: str) -> pa.Table:
        """Some rows without doing them: failed, for a reason."""
        ...


class Actor:
    """Holds the work in one process of the cluster; sets it up when the first shard comes.

    Where that fails, or the device does, the process is of no more use: it gives back what it was given, and ends
    when it is given more, which is then given to the process that Ray starts in its stead.
    """

    def __init__(
        self,
        work: ShardWork,
        out: str,
        beat_seconds: float = BEAT_SECONDS,
        part_seconds: float = PART_SECONDS,
        resumed: bool = True,
    ) -> None:
        self._work, self._out, self._ready, self._broken = work, out, False, False
        self._halted: HaltError | None = None
        self._beat_seconds, self._part_seconds, self._resumed = beat_seconds, part_seconds, resumed
        self._ended = self._since = time.perf_counter()  # since a part was committed
        self._did = False  # whether something was done for the item that is at work
        self._begin()

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        if self._broken:
            os._exit(1)  # its device cannot be had again otherwise; an actor that exits in Ray's way is not replaced
        # One result an item, whatever happens: Ray takes those of a second attempt for those of the first, by number.
        for item in batch["names"][0]:
            yield {key: [value] for key, value in self._run(str(item)).items()}

    def _run(self, item: str) -> dict[str, Any]:
        record, error, began, self._did = None, "", time.perf_counter(), False
        idle, _ = began - self._ended, taken()
        self._begin()
        try:
            if self._halted:
                raise self._halted
            if not self._broken:
                record = self._done(item)
            ended = BACK if self._broken else WELL if self._did else IDLE
        except storage.UnavailableError as problem:  # its sentence says all
            ended, error = HALT if isinstance(problem, HaltError) else AWAY, str(problem)
            self._halted = problem if isinstance(problem, HaltError) else None
        except Exception as problem:  # told to the driver, which goes on with the other shards
            ended = SPENT if isinstance(problem, SpentError) else BROKEN if kind_of(problem) == DEVICE else RAISED
            ended = ended if self._ready else SETUP
            self._broken = ended in (BROKEN, SETUP)
            error = str(problem) if isinstance(problem, DeviceError) else _told(problem)
        self._ended = time.perf_counter()
        seconds = taken() | {"idle": idle, "all": self._ended - began + idle}
        pace = {"seconds": self._ended - self._begun, "cpu": time.process_time() - self._spent}
        cost = getattr(getattr(self._work, "runner", None), "cost", (0, 0))
        told = {"record": record, "seconds": seconds, "place": _place(), "pace": pace, "cost": cost}
        return {"name": item, "ended": ended, "error": error} | {key: strict.dumps(told[key]) for key in told}

    def _begin(self) -> None:
        """From here on an item's pace is measured: what loads before the first is no part of it."""
        self._begun, self._spent = time.perf_counter(), time.process_time()

    def _done(self, item: str) -> Record | None:
        name, rows = read_item(item)
        if not self._ready:
            with clocked("load"):
                self._work.setup()
            self._ready = True
            self._begin()
        if storage.exists(shard_url(self._out, name)):  # a first attempt died just after its commit
            return inspect(self._out, name)
        with Attempt(self._out, item, self._beat_seconds) as attempt:
            return self._make(name, rows, attempt)

    def _make(self, name: str, rows: Rows | None, attempt: Attempt) -> Record | None:
        """Do a shard, or some rows of it; the record of the shard where all of it is done then."""
        if not isinstance(self._work, PartWork):
            table = self._work(name)
            self._did = True
            with clocked("write"):
                return commit(self._out, name, table)
        shard = self._work.open(name)
        whole = (0, len(shard.sample_ids))
        found = parts_of(self._out, name) if self._resumed or attempt.number > 1 else []
        own: dict[Part, pa.Table] = {}
        self._since = time.perf_counter()
        for gap in gaps(rows or whole, found) or ([] if found else [whole]):
            for first, table in shard.tables(gap, self._due):
                own[part := Part.of(first, table)] = table
                self._did = self._did or part.accepted > 0  # else the device may have had nothing to do
                if not gaps(whole, [*found, *own]):
                    break  # it need not be written apart
                with clocked("write"):
                    commit_part(self._out, name, part, table)
                    attempt.advanced()
                self._since = time.perf_counter()
        with clocked("write"):
            if gaps(whole, [*found, *own]) and gaps(whole, parts_of(self._out, name)):
                return None  # others are at the rest
            try:
                return merge(self._out, name, shard.sample_ids, own)
            except FileNotFoundError:
                if not storage.exists(shard_url(self._out, name)):
                    raise
                return inspect(self._out, name)  # another merged it just now

    def _due(self) -> bool:
        return time.perf_counter() - self._since >= self._part_seconds


def _told(problem: Exception) -> str:
    place = traceback.extract_tb(problem.__traceback__)[-1]
    said = f"{DEVICE}: " if kind_of(problem) == DEVICE else ""
    return f"{said}{type(problem).__name__}: {problem} ({storage.name(place.filename)}, line {place.lineno})"


def _place() -> Place:
    host = socket.gethostname()
    import ray  # slow to import: `plan` does without

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else host
    return Place(node, host, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
