"""Run work over shards on Ray Data: each shard is read, worked on and committed by one call of one actor."""

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from infra import storage, strict
from infra.data.clock import clocked, taken
from infra.data.ledger import STATES, Ledger, commit, inspect, pending, total
from infra.data.parts import split
from infra.data.revision import Redo
from infra.data.shards import joined_names, shard_url
from infra.data.stage import Stage
from infra.data.work import StageWork
from infra.metrics import Report
from infra.raylet import watched

ATTEMPTS = "attempts"  # a folder that counts the workers that died over a shard, and tells where they are
MAX_ATTEMPTS = 3  # workers may die for many reasons, but when three have died over one shard, the shard is to blame
MAX_AWAY = 4  # shards that met a server that fails or refuses, or a full disk: the others would fare no better
MAX_BAD_SHARDS = 16  # more than that is not a few bad shards but a broken set-up
BEAT_SECONDS = 10  # after which a worker that is still at a shard says where it is, again and again
MAX_TOLD = 3  # of the shards that are at work when none ends
OURS = f"{Path(__file__).parents[1]}/"
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
    states = dict.fromkeys(STATES, 0)
    errors: dict[str, str] = {}
    seconds: dict[str, float] = {}
    away = 0

    def tell() -> None:
        if report:
            report(done, len(names), "shards", why=partial(_at_work, out, cpus, gpus), rows=rows, **states)

    tell()
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
                states = {state: count + record[state] for state, count in states.items()}
                tell()
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
            fn_constructor_args=(work, out, BEAT_SECONDS),
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

    def __init__(self, work: ShardWork, out: str, beat_seconds: float = BEAT_SECONDS) -> None:
        self._work, self._out, self._ready, self._every = work, out, False, beat_seconds
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
                record = strict.dumps(inspect(self._out, name))
            else:
                with self._attempt(name):
                    table = self._work(name)
                    with clocked("write"):
                        record = strict.dumps(commit(self._out, name, table))
        except storage.UnavailableError as problem:  # its sentence says all
            error, away = str(problem), True
        except Exception as problem:  # told to the driver, which goes on with the other shards
            place = traceback.extract_tb(problem.__traceback__)[-1]
            where = f"{storage.name(place.filename)}, line {place.lineno}"
            error = f"{type(problem).__name__}: {problem} ({where})"
        self._ended = time.perf_counter()
        seconds = taken() | {"idle": idle, "all": self._ended - began + idle}
        return {"name": name, "record": record, "error": error, "away": away, "seconds": strict.dumps(seconds)}

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Leave a count behind if the process dies in here."""
        url = storage.join(self._out, ATTEMPTS, name)
        try:
            died = storage.read_json(url)["attempts"]
        except FileNotFoundError:
            died = 0
        if died >= MAX_ATTEMPTS:
            raise RuntimeError(f"{died} workers died over it, perhaps for want of memory")
        attempt = {"attempts": died + 1, "host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
        storage.write_json(url, attempt)
        with _beating(url, attempt, self._every):
            yield
        storage.remove(url)


@contextmanager
def _beating(url: str, attempt: Mapping[str, Any], every: float) -> Iterator[None]:
    """Write now and then where this thread is, so that a driver that hears of no shard can say why."""
    stop, thread = threading.Event(), threading.get_ident()

    def beat() -> None:
        while not stop.wait(every):
            frame = sys._current_frames().get(thread)
            with suppress(Exception):
                storage.write_json(url, {**attempt, "beat": time.time(), "doing": place_in(frame)})

    beats = threading.Thread(target=beat, name="beat", daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()  # what is written after the attempt's end would count as one


def place_in(frame: FrameType | None) -> str:
    """Where a thread is: the last place in this package, whom it called from there, and where that has got to."""
    stack = traceback.extract_stack(frame) if frame else []
    last = max((number for number, each in enumerate(stack) if each.filename.startswith(OURS)), default=-1)
    places = [stack[number] for number in sorted({max(last, 0), last + 1, len(stack) - 1}) if number < len(stack)]
    return " > ".join(f"{storage.name(each.filename)}:{each.lineno} {each.name}" for each in places)


def _at_work(out: str, cpus: float, gpus: float) -> str:
    """What the workers are at, by what they left in the folder of attempts: asked when no shard ends."""
    folder, now = storage.join(out, ATTEMPTS), time.time()
    names = storage.list_names(folder)
    told = []
    for name in names[:MAX_TOLD]:
        with suppress(FileNotFoundError):  # it ended meanwhile
            told.append(_doing(name, storage.read_json(storage.join(folder, name)), now))
    if not told:
        asks = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        return f"no worker is at a shard, and each asks for {asks}"
    return "; ".join(told) + (f"; {len(names) - MAX_TOLD} more shards are at work" if len(names) > MAX_TOLD else "")


def _doing(name: str, attempt: Mapping[str, Any], now: float) -> str:
    who = f"shard {name} is with process {attempt['process']} on {attempt['host']} for {now - attempt['since']:.0f} s"
    quiet = now - attempt.get("beat", attempt["since"])
    if quiet > 3 * BEAT_SECONDS:
        return f"{who}, which says nothing for {quiet:.0f} s"
    return f"{who}, at {attempt['doing']}" if attempt.get("doing") else who


def _lost(left: list[str], errors: dict[str, str], out: str) -> str:
    named = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    name, error = next(iter(errors.items()), (left[0], "no word of why"))
    return f"{len(left)} shards of {out} could not be made: {named}. Shard {name} ended with {error.rstrip('.')}."
