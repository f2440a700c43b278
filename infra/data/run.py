"""Run work over shards on Ray Data: each shard is read, worked on and committed by one call of one actor."""

import json
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from infra import storage
from infra.data.clock import clocked, taken
from infra.data.ledger import Ledger, commit, inspect, pending, total
from infra.data.parts import split
from infra.data.revision import Redo
from infra.data.shards import joined_names, shard_url
from infra.data.stage import Stage
from infra.data.work import StageWork
from infra.raylet import watched

Report = Callable[..., None]

ATTEMPTS = "attempts"  # a folder that counts the workers that died over a shard
MAX_ATTEMPTS = 3  # workers may die for many reasons, but when three have died over one shard, the shard is to blame
MAX_AWAY = 4  # shards that met a server that fails or refuses, or a full disk: the others would fare no better
MAX_BAD_SHARDS = 16  # more than that is not a few bad shards but a broken set-up
SHARES = 1000  # of the shards that are left, a part is one of so many shares


class ShardWork(Protocol):
    """A picklable object that makes one shard's table; `setup` is called once in each actor."""

    def setup(self) -> None:
        """Load what all shards need."""
        ...

    def __call__(self, name: str) -> pa.Table:
        """The rows of a shard: sample_id, state, reason and further columns."""
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
    the end. Whatever was committed stays, so that the next call does only the rest.
    """
    assert ray.is_initialized(), "call infra.cluster.connect first: Ray Data would start a cluster of its own making"
    left = pending(out, names)
    ledger = Ledger(out)
    storage.remove(storage.join(out, ATTEMPTS))
    done, rows = len(names) - len(left), 0
    errors: dict[str, str] = {}
    seconds: dict[str, float] = {}
    away = 0
    if report:
        report(done, len(names), "shards", rows=rows)
    results = _results(work, left, out, cpus, gpus, actors)
    try:
        for result in results:
            for part, spent in json.loads(result["seconds"]).items():
                seconds[part] = seconds.get(part, 0.0) + spent
            if result["error"]:
                errors[result["name"]] = result["error"]
                away += int(result["away"])
            else:
                record = json.loads(result["record"])
                ledger.add(result["name"], record)
                done, rows = done + 1, rows + record["rows_in"]
                if report:
                    report(done, len(names), "shards", rows=rows)
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
    return total(ledger.close().values()) | {
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


def _results(
    work: ShardWork, names: list[str], out: str, cpus: float, gpus: float, actors: tuple[int, int]
) -> Generator[Any]:
    """Yield {name, record, error, away} of each shard as it ends; away: the place of its files was at fault."""
    if not names:
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises, too
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.9  # of actors at work, more are asked for
    context.target_max_block_size = 1  # byte: a result is told as it comes, not with the others of its part
    context.max_consecutive_actor_init_deaths = MAX_ATTEMPTS
    most = min(actors[1], len(names))
    least = min(actors[0], most)
    parts = [{"names": part} for part in split(names, max(SHARES, 4 * most))]
    with DataContext.current(context):
        # One block a part: a block is what Ray Data retries, for ever, when a worker dies.
        results = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            _Actor,
            fn_constructor_args=(work, out),
            batch_size=1,
            batch_format="numpy",
            # One part at a time: else one actor holds two while another has none, which doubles the time of few shards.
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

    def __init__(self, work: ShardWork, out: str) -> None:
        self._work, self._out, self._ready = work, out, False
        self._ended = time.perf_counter()

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        for name in batch["names"][0]:
            yield {key: [value] for key, value in self._run(str(name)).items()}

    def _run(self, name: str) -> dict[str, Any]:
        record, error, away, began = "", "", False, time.perf_counter()
        idle, _ = began - self._ended, taken()
        try:
            if not self._ready:
                with clocked("load"):
                    self._work.setup()
                self._ready = True
            if storage.exists(shard_url(self._out, name)):  # a first attempt died just after its commit
                record = json.dumps(inspect(self._out, name))
            else:
                with self._attempt(name):
                    table = self._work(name)
                    with clocked("write"):
                        record = json.dumps(commit(self._out, name, table))
        except storage.UnavailableError as problem:  # its sentence says all
            error, away = str(problem), True
        except Exception as problem:  # told to the driver, which goes on with the other shards
            place = traceback.extract_tb(problem.__traceback__)[-1]
            where = f"{storage.name(place.filename)}, line {place.lineno}"
            error = f"{type(problem).__name__}: {problem} ({where})"
        self._ended = time.perf_counter()
        seconds = taken() | {"idle": idle, "all": self._ended - began + idle}
        return {"name": name, "record": record, "error": error, "away": away, "seconds": json.dumps(seconds)}

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Leave a count behind if the process dies in here."""
        url = storage.join(self._out, ATTEMPTS, name)
        try:
            died = int(storage.read_bytes(url))
        except FileNotFoundError:
            died = 0
        if died >= MAX_ATTEMPTS:
            raise RuntimeError(f"{died} workers died over it, perhaps for want of memory")
        storage.write_bytes(url, str(died + 1).encode())
        yield
        storage.remove(url)


def _lost(left: list[str], errors: dict[str, str], out: str) -> str:
    named = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    name, error = next(iter(errors.items()), (left[0], "no word of why"))
    return f"{len(left)} shards of {out} could not be made: {named}. Shard {name} ended with {error.rstrip('.')}."
