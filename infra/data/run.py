"""Run work over shards on Ray Data: each is read, worked on and committed by actors, a shard or a part at a time."""

import json
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from infra import storage
from infra.data import wide
from infra.data.actor import PART_SECONDS, Actor, PartWork, ShardWork
from infra.data.attempts import ATTEMPTS, BEAT_SECONDS, MAX_ATTEMPTS, at_work
from infra.data.faults import Faults
from infra.data.health import AWAY, BACK, BROKEN, HALT, IDLE, RAISED, SETUP, SPENT, WELL, Health, Place
from infra.data.ledger import Ledger, commit, pending, side_files, total
from infra.data.parts import PARTS, Part, Rows, all_parts, commit_part, cut, gaps, item_of, read_item
from infra.data.portions import split
from infra.data.revision import Redo
from infra.data.shards import joined_names
from infra.data.stage import Stage
from infra.data.telling import Telling
from infra.data.work import StageWork
from infra.metrics import Report
from infra.raylet import broke_off, watched

MAX_COUNTED = 20_000  # shards whose rows are looked up before work begins; of more, shards are counted
PIECES = 3  # of rows for each actor, where there are fewer shards than actors
SHARES = 1000  # of the shards that are left, a portion is one of so many shares
WAIT_SECONDS = 2.0  # before what failed once is tried again; twice as long where it failed twice


class Pace(NamedTuple):
    """How long an actor was at some rows, what its process took, and whether they were the first that it saw."""

    rows: int
    seconds: float
    cpu_seconds: float
    first: bool


@dataclass
class Few:
    """Of all shards that `names` are, no more than the first `most` are done; `paces` are told as these end."""

    most: int
    names: list[str] = field(default_factory=list)
    paces: list[Pace] = field(default_factory=list)


_FEW: ContextVar[Few | None] = ContextVar("few", default=None)


@contextmanager
def few(most: int) -> Iterator[Few]:
    """What is run in here does a few shards and ends as if there were no others; for who tries a step on a piece."""
    asked = Few(most)
    token = _FEW.set(asked)
    try:
        yield asked
    finally:
        _FEW.reset(token)


def first_few(names: Sequence[str]) -> Sequence[str]:
    """The shards that are to be done: all, but within `few`."""
    if (asked := _FEW.get()) is None:
        return names
    asked.names = list(names)
    return names[: asked.most]


def _note(result: Mapping[str, Any]) -> None:
    """Tell who tries a few shards how an item went, if it went well."""
    asked = _FEW.get()
    if asked is None or result["ended"] != WELL:
        return
    record, (_, rows), pace = json.loads(result["record"]), read_item(result["name"]), json.loads(result["pace"])
    if rows or record:
        count = rows[1] - rows[0] if rows else record["rows_in"]
        asked.paces.append(Pace(count, pace["seconds"], pace["cpu"], "load" in json.loads(result["seconds"])))


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
    these the parts that were clocked; what `read` and `decode` took in threads ran beside the rest. Where models of
    torch computed, `frozen_flops` is what all accepted rows took, by the first batch of each actor of this call.

    Shards whose work raises, or kills its worker, do not stop the others: they are tried again behind them, three times
    in all. Rows over which devices fail are found, and failed; a node on which all fails is left out (`Health`).
    RuntimeError names what could not be made. Whatever was committed stays, shards and parts, so that the next call
    does only the rest.
    """
    import ray  # slow to import, here and below: `plan` does without
    import ray.exceptions

    assert ray.is_initialized(), "call infra.cluster.connect first: Ray Data would start a cluster of its own making"
    names = first_few(names)
    left = pending(out, names)
    storage.remove(storage.join(out, ATTEMPTS))
    counts = work.counts() if isinstance(work, PartWork) and len(names) <= MAX_COUNTED else {}
    parts = all_parts(out)
    telling = Telling(names, left, parts, counts, out, report, partial(at_work, out, cpus, gpus))
    run = _Run(work, out, telling, Health(partial(_nodes, cpus, gpus)))
    try:
        with telling:
            items = _plan(work, left, parts, actors[1], run.faults)
            while items:
                run.health.begin()
                avoided = len(run.health.out)
                with closing(_results(work, items, out, cpus, gpus, actors, bool(parts), run.health.out)) as results:
                    for result in results:
                        run.hear(result)
                        _note(result)
                        if run.health.over or len(run.health.out) > avoided:
                            break
                if left := pending(out, left):
                    run.settle(begun=len(left) < len(names) or bool(all_parts(out)))
                    parts = all_parts(out)
                items = run.again(left, parts, actors[1])
    except ray.exceptions.RayError as error:
        raise broke_off(error) from error
    finally:
        run.ledger.save()
    storage.remove(storage.join(out, ATTEMPTS))
    if left := pending(out, names):
        if run.halted and not run.health.over:
            raise RuntimeError(f"{run.halted} {telling.so_far()}")
        raise RuntimeError(_lost(left, run.errors, run.health.out.values(), out))
    storage.remove(storage.join(out, PARTS))
    run.faults.close()
    records = run.ledger.close()
    wide.sweep(out, side_files(records.values()))
    counts = total(records.values())
    flops, rows = run.cost
    return (
        counts
        | {"actor_seconds": {part: round(spent, 2) for part, spent in sorted(run.seconds.items())}}
        | ({"frozen_flops": flops / rows * counts["accepted"]} if flops else {})
    )


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


def run_here(
    stages: Sequence[Stage], inputs: Sequence[str], out: str, *, batch_size: int, report: Report | None = None
) -> dict[str, Any]:
    """Do what `run_stages` does in this process, without Ray: for rows so few that actors are not worth their start."""
    work, ledger = StageWork(tuple(stages), tuple(inputs), batch_size, Redo.of_folder(out)), Ledger(out)
    names = first_few(joined_names(inputs))
    left = pending(out, names)
    if left:
        work.load()
    for done, name in enumerate(left, len(names) - len(left) + 1):
        ledger.add(name, commit(out, name, work(name)))
        if report:
            report(done, len(names), "shards")
    storage.remove(storage.join(out, PARTS))  # of actors of before, which other hardware had
    records = ledger.close()
    wide.sweep(out, side_files(records.values()))
    return total(records.values())


class _Run:
    """What a driver learns of its items, from one round of them to the next."""

    def __init__(self, work: ShardWork, out: str, telling: Telling, health: Health) -> None:
        self.ledger, self.faults, self.health = Ledger(out), Faults(out), health
        self.halted = ""  # why nobody goes on
        self.errors: dict[str, str] = {}  # the last of each item that did not end well
        self.seconds: Counter[str] = Counter()
        self.cost = (0, 0)  # FLOPs, and the rows that they were counted of
        self._work, self._out, self._telling = work, out, telling
        self._tries: Counter[str] = Counter()  # the rounds in which a shard failed
        self._failed: set[str] = set()  # in this round
        self._excused = False  # whether something failed that may do better in another process, or elsewhere

    def hear(self, result: Mapping[str, Any]) -> None:
        """An item ended, as `Actor` tells it."""
        item, ended, error = result["name"], result["ended"], result["error"]
        (name, _), place = read_item(item), Place(*json.loads(result["place"]))
        self.seconds.update(json.loads(result["seconds"]))
        flops, rows = json.loads(result.get("cost", "[0, 0]"))
        self.cost = (self.cost[0] + flops, self.cost[1] + rows)
        news = ended != BROKEN or self.faults.times(name) != 1
        counts = self.health.heard(place, name, ended, error, news)
        if ended in (WELL, IDLE):
            self.errors.pop(item, None)
            if record := json.loads(result["record"]):
                self.ledger.add(name, record)
                self._telling.ended(name, record)
        elif ended != BACK:
            self.errors[item] = error
        self.halted = error if ended == HALT else self.halted
        self._excused = self._excused or ended in (SETUP, BROKEN)
        if ended == BROKEN and counts:
            self.faults.add(item, place, error)
            self.settle(begun=False)  # at once, else a driver that is killed leaves the next one no row to tell by
        elif ended in (RAISED, AWAY):
            self._failed.add(name)
        elif ended == SPENT:
            self._tries[name] = MAX_ATTEMPTS

    def settle(self, begun: bool) -> None:
        """Fail the rows that were found to be at fault; `begun`: other rows were done, be it by an earlier driver."""
        if isinstance(self._work, PartWork):
            for name, rows, why in self.faults.found(self.health.well, begun):
                table = self._work.open(name).written_off(rows, why)
                commit_part(self._out, name, Part.of(rows[0], table), table)

    def again(self, left: Sequence[str], parts: Mapping[str, list[Part]], actors: int) -> list[str]:
        """The items of the next round, those that failed last, after a while; none where to try again is no use."""
        self._tries.update(self._failed)
        self._failed.clear()
        if self.halted or self.health.over or not (self.health.well or self._excused):
            return []
        tried = [name for name in left if self._tries[name] < MAX_ATTEMPTS]
        planned = _plan(self._work, tried, parts, actors, self.faults)
        tries = {item: self._tries[read_item(item)[0]] for item in planned if self.faults.here[item] < MAX_ATTEMPTS}
        if most := max(tries.values(), default=0):
            time.sleep(WAIT_SECONDS * 2 ** (most - 1))
        return sorted(tries, key=tries.__getitem__)


def _plan(
    work: ShardWork, left: Sequence[str], parts: Mapping[str, list[Part]], actors: int, faults: Faults
) -> list[str]:
    """What the actors are to do: shards, and, where these are fewer than actors, what is left of them in pieces.

    A shard over which two processes ended by an error of their device comes in pieces, too.
    """
    if not isinstance(work, PartWork):
        return list(left)
    items: list[str] = []
    for name in left:
        pieces: list[Rows] = []
        suspect = faults.times(name) > 1
        if suspect or len(left) < actors:
            with suppress(Exception):  # the actor that is given all of it will say why
                shard = work.open(name)
                rows = len(shard.sample_ids)
                found = gaps((0, rows), parts.get(name, []))
                least = -(-sum(end - first for first, end in found) * len(left) // (PIECES * actors))
                starts, least = (faults.cuts(name, rows), 1) if suspect else (shard.starts, least)
                pieces = [piece for gap in found for piece in cut(gap, starts, least)]
        alone = len(pieces) < 2 and not (pieces and suspect)
        items += [name] if alone else [item_of(name, piece) for piece in pieces]
    return items


def _results(
    work: ShardWork,
    items: list[str],
    out: str,
    cpus: float,
    gpus: float,
    actors: tuple[int, int],
    resumed: bool,
    avoided: Iterable[str],
) -> Generator[Any]:
    """Yield what `Actor` tells of each item as it ends; no actor is on nodes `avoided`."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises, too
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.9  # of actors at work, more are asked for
    context.target_max_block_size = 1  # byte: a result is told as it comes, not with the others of its portion
    context.max_consecutive_actor_init_deaths = MAX_ATTEMPTS
    placed: dict[str, Any] = {"label_selector": {"ray.io/node-id": f"!in({','.join(avoided)})"}} if avoided else {}
    most = min(actors[1], len(items))
    least = min(actors[0], most)
    portions = [{"names": portion} for portion in split(items, max(SHARES, 4 * most))]
    with DataContext.current(context):
        # One block a portion: a block is what Ray Data retries, for ever, when a worker dies.
        results = ray.data.from_items(portions, override_num_blocks=len(portions)).map_batches(
            Actor,
            fn_constructor_args=(work, out, BEAT_SECONDS, PART_SECONDS, resumed),
            batch_size=1,
            batch_format="numpy",
            # One portion at a time: else one actor holds two while another has none: twice the time of few shards.
            compute=ActorPoolStrategy(
                min_size=least, max_size=most, initial_size=least, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=cpus,
            num_gpus=gpus,
            **placed,
        )
        with watched():
            yield from results.iter_rows()


def _nodes(cpus: float, gpus: float) -> set[str]:
    """The ids of the living nodes on which an actor of so many CPUs and GPUs may be."""
    import ray

    nodes = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return {node["NodeID"] for node, has in nodes if has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus}


def _lost(left: list[str], errors: dict[str, str], avoided: Iterable[str], out: str) -> str:
    named = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    of_left = {item: error for item, error in errors.items() if read_item(item)[0] in {*left}}
    item, error = next(iter((of_left or errors).items()), (left[0], "no word of why"))
    told = f"{len(left)} shards of {out} could not be made: {named}. Shard {item} ended with {error.rstrip('.')}."
    return " ".join([told, *avoided])
