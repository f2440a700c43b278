"""Run work over shards on Ray Data: each is read, worked on and committed by actors, a shard or a part at a time."""

import json
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from infra import storage, strict
from infra.data import wide
from infra.data.attempts import ATTEMPTS, BEAT_SECONDS, MAX_ATTEMPTS, Attempt, at_work
from infra.data.clock import clocked, taken
from infra.data.ledger import Ledger, Record, commit, inspect, pending, side_files, total
from infra.data.parts import PARTS, Part, Rows, all_parts, commit_part, cut, gaps, item_of, merge, parts_of, read_item
from infra.data.portions import split
from infra.data.revision import Redo
from infra.data.shards import joined_names, shard_url
from infra.data.stage import Stage
from infra.data.telling import Telling
from infra.data.work import StageWork
from infra.metrics import Report
from infra.raylet import watched

MAX_AWAY = 4  # shards that met a server that fails or refuses, or a full disk: the others would fare no better
MAX_BAD_SHARDS = 16  # more than that is not a few bad shards but a broken set-up
MAX_COUNTED = 20_000  # shards whose rows are looked up before work begins; of more, shards are counted
PART_SECONDS = 20  # of work that is not committed; a shard that takes no longer has no parts
PIECES = 3  # of rows for each actor, where there are fewer shards than actors
SHARES = 1000  # of the shards that are left, a portion is one of so many shares


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

    def tables(self, rows: Rows, due: Callable[[], bool]) -> Iterator[pa.Table]:
        """Do some rows, and yield them in order: whenever `due`, and at the end, which is one table at least."""
        ...


def run_shards(
    work: ShardWork,
    names: Sequence[str],
    out: str,
    *,
    cpus: float = 1,
    gpus: float = 0,
    actors: tuple[int, int] = (1, 2),
    report: Report | None = None,
) -> dict[str, Any]:
    """Commit `work(name)` to `<out>/shards/<name>.parquet` for each name that has no such file; return the counts.

    With them come `actor_seconds`, what the actors spent on the shards of this call, summed over them: `all`, and of
    these the parts that were clocked; what `read` and `decode` took in threads ran beside the rest.

    Shards whose work raises, or kills its worker again and again, do not stop the others; RuntimeError names them at
    the end. Whatever was committed stays, shards and parts, so that the next call does only the rest.
    """
    assert ray.is_initialized(), "call infra.cluster.connect first: Ray Data would start a cluster of its own making"
    left = pending(out, names)
    ledger = Ledger(out)
    storage.remove(storage.join(out, ATTEMPTS))
    counts = work.counts() if isinstance(work, PartWork) and len(names) <= MAX_COUNTED else {}
    parts = all_parts(out)
    errors: dict[str, str] = {}
    seconds: dict[str, float] = {}
    away = 0
    telling = Telling(names, left, parts, counts, out, report, partial(at_work, out, cpus, gpus))
    items = _plan(work, left, parts, actors[1])
    results = _results(work, items, out, cpus, gpus, actors, bool(parts))
    try:
        with telling:
            for result in results:
                for part, spent in json.loads(result["seconds"]).items():
                    seconds[part] = seconds.get(part, 0.0) + spent
                name, _ = read_item(result["name"])
                if result["error"]:
                    errors[result["name"]] = result["error"]
                    away += int(result["away"])
                elif record := json.loads(result["record"]):
                    ledger.add(name, record)
                    telling.ended(name, record)
                if len(errors) > MAX_BAD_SHARDS or away > MAX_AWAY:
                    break
    except ray.exceptions.RayError as error:  # work tells its errors itself: this is a node that went, or Ray
        told = " ".join(str(error).split())[:300]
        raise RuntimeError(f"Ray broke off: {told} What was committed stays; give the same command again.") from error
    finally:
        results.close()
        ledger.save()
    storage.remove(storage.join(out, ATTEMPTS))
    if left := pending(out, names):
        raise RuntimeError(_lost(left, errors, out))
    storage.remove(storage.join(out, PARTS))
    records = ledger.close()
    wide.sweep(out, side_files(records.values()))
    return total(records.values()) | {
        "actor_seconds": {part: round(spent, 2) for part, spent in sorted(seconds.items())}
    }


def run_stages(
    stages: Sequence[Stage],
    inputs: Sequence[str],
    out: str,
    *,
    batch_size: int,
    actors: tuple[int, int] = (1, 2),
    report: Report | None = None,
) -> dict[str, Any]:
    """Run stages over the rows of artifacts of one ingest and commit sidecars with their `writes`; return the counts.

    An actor asks for the most CPUs and GPUs that any of the stages does, since they take turns.
    """
    return run_shards(
        StageWork(tuple(stages), tuple(inputs), batch_size, Redo.of_folder(out)),
        joined_names(inputs),
        out,
        cpus=max(stage.cpus for stage in stages),
        gpus=max(stage.gpus for stage in stages),
        actors=actors,
        report=report,
    )


def _plan(work: ShardWork, left: Sequence[str], parts: Mapping[str, list[Part]], actors: int) -> list[str]:
    """What the actors are to do: shards, and, where these are fewer than actors, what is left of them in pieces."""
    if not isinstance(work, PartWork) or len(left) >= actors:
        return list(left)
    items: list[str] = []
    for name in left:
        pieces: list[Rows] = []
        with suppress(Exception):  # the actor that is given all of it will say why
            shard = work.open(name)
            found = gaps((0, len(shard.sample_ids)), parts.get(name, []))
            least = -(-sum(end - first for first, end in found) * len(left) // (PIECES * actors))
            pieces = [piece for gap in found for piece in cut(gap, shard.starts, least)]
        items += [item_of(name, piece) for piece in pieces] if len(pieces) > 1 else [name]
    return items


def _results(
    work: ShardWork, items: list[str], out: str, cpus: float, gpus: float, actors: tuple[int, int], resumed: bool
) -> Generator[Any]:
    """Yield {name, record, error, away} of each item as it ends; away: the place of its files was at fault."""
    if not items:
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises, too
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.9  # of actors at work, more are asked for
    context.target_max_block_size = 1  # byte: a result is told as it comes, not with the others of its portion
    context.max_consecutive_actor_init_deaths = MAX_ATTEMPTS
    most = min(actors[1], len(items))
    least = min(actors[0], most)
    portions = [{"names": portion} for portion in split(items, max(SHARES, 4 * most))]
    with DataContext.current(context):
        # One block a portion: a block is what Ray Data retries, for ever, when a worker dies.
        results = ray.data.from_items(portions, override_num_blocks=len(portions)).map_batches(
            _Actor,
            fn_constructor_args=(work, out, BEAT_SECONDS, PART_SECONDS, resumed),
            batch_size=1,
            batch_format="numpy",
            # One portion at a time: else one actor holds two while another has none: twice the time of few shards.
            compute=ActorPoolStrategy(
                min_size=least, max_size=most, initial_size=least, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        with watched():
            yield from results.iter_rows()


class _Actor:
    """Holds the work in one process of the cluster; sets it up when the first shard comes."""

    def __init__(
        self,
        work: ShardWork,
        out: str,
        beat_seconds: float = BEAT_SECONDS,
        part_seconds: float = PART_SECONDS,
        resumed: bool = True,
    ) -> None:
        self._work, self._out, self._ready = work, out, False
        self._beat_seconds, self._part_seconds, self._resumed = beat_seconds, part_seconds, resumed
        self._ended = self._since = time.perf_counter()  # since a part was committed

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        # One result an item, whatever happens: Ray takes those of a second attempt for those of the first, by number.
        for item in batch["names"][0]:
            yield {key: [value] for key, value in self._run(str(item)).items()}

    def _run(self, item: str) -> dict[str, Any]:
        record, error, away, began = None, "", False, time.perf_counter()
        idle, _ = began - self._ended, taken()
        name, rows = read_item(item)
        try:
            if not self._ready:
                with clocked("load"):
                    self._work.setup()
                self._ready = True
            if storage.exists(shard_url(self._out, name)):  # a first attempt died just after its commit
                record = inspect(self._out, name)
            else:
                with Attempt(self._out, item, self._beat_seconds) as attempt:
                    record = self._make(name, rows, attempt)
        except storage.UnavailableError as problem:  # its sentence says all
            error, away = str(problem), True
        except Exception as problem:  # told to the driver, which goes on with the other shards
            place = traceback.extract_tb(problem.__traceback__)[-1]
            where = f"{storage.name(place.filename)}, line {place.lineno}"
            error = f"{type(problem).__name__}: {problem} ({where})"
        self._ended = time.perf_counter()
        seconds = taken() | {"idle": idle, "all": self._ended - began + idle}
        told = {"record": strict.dumps(record), "seconds": strict.dumps(seconds)}
        return {"name": item, "error": error, "away": away, **told}

    def _make(self, name: str, rows: Rows | None, attempt: Attempt) -> Record | None:
        """Do a shard, or some rows of it; the record of the shard where all of it is done then."""
        if not isinstance(self._work, PartWork):
            table = self._work(name)
            with clocked("write"):
                return commit(self._out, name, table)
        shard = self._work.open(name)
        whole = (0, len(shard.sample_ids))
        found = parts_of(self._out, name) if self._resumed or attempt.number > 1 else []
        own: dict[Part, pa.Table] = {}
        self._since = time.perf_counter()
        for gap in gaps(rows or whole, found) or ([] if found else [whole]):
            first = gap[0]
            for table in shard.tables(gap, self._due):
                part = Part.of(first, table)
                own[part], first = table, part.end
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


def _lost(left: list[str], errors: dict[str, str], out: str) -> str:
    named = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    name, error = next(iter(errors.items()), (left[0], "no word of why"))
    return f"{len(left)} shards of {out} could not be made: {named}. Shard {name} ended with {error.rstrip('.')}."
