"""Run a small piece of every step that is not done, in a store that goes again, and tell what all of it will take."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from captioner.backends.endpoint import EndpointConfig
from infra import storage
from infra.artifact import Artifact, Planned, Step
from infra.cluster import Cluster
from infra.data.run import Pace, few
from infra.data.sidecar import shard_names
from infra.store import Plan
from infra.train.loop import TrainConfig, Trained
from infra.trouble import explained
from workflows.commands import say
from workflows.estimate import WARM, Estimate, Mark, lines, rate, segments, whole
from workflows.evaluate import ReportConfig
from workflows.kinds import Recipe
from workflows.piece import cut, has_rows, rows_in, stand_in
from workflows.recaption import check_asked
from workflows.sample import SampleConfig
from workflows.scratch import ScratchStore, gpu_watch
from workflows.train_captioner import named

ROUNDS = 2  # of shards for each actor: in the first it begins
MOST_SHARDS = 32
SCORED = 256  # of rows that a step in the command's own process takes, where its config says how many
MARKS = 8  # that a training is asked for
FAULTS = (ValueError, OSError, RuntimeError, ArithmeticError)


class Piece(NamedTuple):
    """What stands for an artifact: some of it, of which it is known how many rows there are in all."""

    artifact: Artifact
    rows: float  # in all; 0 where it has none
    tests: float  # of them, held out


class Taken(NamedTuple):
    """What a piece of a step took."""

    made: Artifact
    marks: list[Mark]
    names: list[str]  # of all shards that there would be; none where it has no shards of its own
    paces: list[Pace]  # of its actors
    worker_gb: float
    gpu_gb: float

    @property
    def seconds(self) -> float:
        return self.made.manifest["seconds"]

    @property
    def cpu_seconds(self) -> float:
        return self.made.manifest["cpu_seconds"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of a step is tried."""

    steps: int = 40  # of each training
    rows: int = 1000  # of a shard

    def __post_init__(self) -> None:
        if self.steps < 4 or self.rows < 1:
            raise ValueError(f"A probe has 4 training steps and a row of a shard at least, not {self}.")


class ProbeStore(Plan):
    """Stands where a Plan stands, and tries a piece of each step that is not done, with `cluster`, below `scratch`."""

    def __init__(self, root: str, cluster: Cluster, scratch: str, sizes: Sizes) -> None:
        super().__init__(root)
        self.estimates: list[Estimate] = []
        self._cluster = replace(cluster, track=(), log_ids=False)
        self._scratch, self._sizes = scratch, sizes
        self._shards = min(MOST_SHARDS, ROUNDS * cluster.actors[1])
        self._pieces: dict[str, Piece] = {}  # by path of what they stand for
        self._lost: dict[str, str] = {}  # steps of which there is no piece

    def step(self, work: Step, config: Any, *inputs: Artifact | None) -> Any:
        """As a Plan's; what can go wrong with a piece is told of it, and the next step is tried."""
        made = super().step(work, config, *inputs)
        if made is None or made.path in self._pieces or made.path in self._lost:
            return made
        try:
            if isinstance(made, Planned):
                given = [None if each is None else self._piece_of(each) for each in inputs]
                self.estimates.append(self._probe(work, config, made, given))
            else:
                self._pieces[made.path] = self._cut(made)
        except FAULTS as error:
            self._lost[made.path] = work.name
            if isinstance(made, Planned):
                self.estimates.append(Estimate(step=work.name, id=made.id, failed=_sentence(error)))
        return made

    def _piece_of(self, made: Artifact) -> Piece:
        if made.path not in self._pieces:
            raise ValueError(f"It reads what `{self._lost[made.path]}` makes, of which there is no piece.")
        return self._pieces[made.path]

    def _cut(self, made: Artifact) -> Piece:
        if not has_rows(made):
            return Piece(made, 0, 0)
        names = shard_names(made.path)[: self._shards]
        rows, tests = rows_in(made.path)
        return Piece(cut(made, storage.join(self._scratch, "cut"), names, self._sizes.rows), rows, tests)

    def _probe(self, work: Step, config: Any, made: Planned, given: Sequence[Piece | None]) -> Estimate:
        inputs = [None if each is None else each.artifact for each in given]
        if (server := _served(work, inputs)) and not self._cluster.max_requests:
            self._put_texts(work, config, server, made, given)
            raise ValueError(
                f"{server.model} is not asked, since each answer costs: give --max-requests, and as many are. In what "
                "follows the corpus's own texts stand for its captions."
            )
        if getattr(config, "trainings", None):
            return self._training(work, config, made, inputs)
        if server:
            found = self._sharded(work, config, made, self._affordable(config, server, inputs), given)
            self._put_texts(work, config, server, made, given)  # of more rows than may be asked for
            return found
        if isinstance(config, SampleConfig):
            return self._drawing(work, config, made, inputs, given)
        return self._sharded(work, config, made, inputs, given)

    def _take(self, work: Step, config: Any, inputs: Sequence[Artifact | None], root: str = "made") -> Taken:
        store = ScratchStore(storage.join(self._scratch, root), self._cluster)
        with few(self._shards) as asked, gpu_watch() as gpu:
            made = store.step(work, config, *inputs)
        return Taken(
            made, store.marking.marks, asked.names, asked.paces, store.marking.watch.largest_gb, max(gpu, default=0.0)
        )

    def _training(self, work: Step, config: Any, made: Planned, inputs: Sequence[Artifact | None]) -> Estimate:
        short = shortened(config, self._sizes.steps)
        taken = self._take(work, short, inputs)
        self._pieces[made.path] = Piece(taken.made, 0, 0)
        notes, seconds, spent, speed = list[str](), list[tuple[float, float]](), list[tuple[float, float]](), 0.0
        pairs = list(zip(config.trainings, short.trainings, strict=True))
        for (real, tried), marks in zip(pairs, _matched([each for _, each in pairs], taken.marks), strict=True):
            steps, times = tried.config.steps, real.config.steps / tried.config.steps
            pace = rate(marks, WARM * steps)
            if times > 1:
                notes.append(f"{steps} of {real.config.steps:,} steps")
            if pace is None and times > 1 and taken.marks:
                notes.append("their pace was not seen apart from the start, so it is told too slow")
                pace = taken.seconds / steps / len(pairs), taken.cpu_seconds / steps / len(pairs)
            if pace is not None:
                seconds.append((pace[0] * steps, times))
                spent.append((pace[1] * steps, times))
                speed = speed or real.config.batch / max(pace[0], 1e-9)
        if notes:
            notes.append("checkpoints but the last, looks at held-out rows and longer lists of rows are not counted")
        return self._estimate(made, taken, seconds, spent, speed, 1.0, notes)

    def _drawing(
        self,
        work: Step,
        config: SampleConfig,
        made: Planned,
        inputs: Sequence[Artifact | None],
        given: Sequence[Piece | None],
    ) -> Estimate:
        most = max(1, self._shards * config.batch // config.pictures)
        short = replace(config, prompts=config.prompts[:most], count=min(config.count, most))
        taken = self._take(work, short, inputs)
        drawn, asked = taken.made.summary["rows_in"], len(config.prompts) * config.pictures
        tests = next((each.tests for each in given if each is not None and each.tests), 0)
        asked = asked or round(min(config.count, tests or config.count)) * config.pictures
        names = len(taken.names) if config.prompts_file else 0
        times = names / min(names, self._shards) if names else max(1.0, asked / max(drawn, 1))
        notes = [f"{drawn:,} of about {drawn * times:,.0f} pictures"] if times > 1 else []
        if drawn <= config.batch < drawn * times and not self._cluster.gpus_per_actor:
            notes.append("more of them are drawn by actors, whose start is not counted")
        self._pieces[made.path] = Piece(taken.made, 0, 0)
        return self._by_shards(made, taken, times, drawn, notes)

    def _sharded(
        self, work: Step, config: Any, made: Planned, inputs: Sequence[Artifact | None], given: Sequence[Piece | None]
    ) -> Estimate:
        """A step over shards; one without any is done in the command's process."""
        source = next((each for each in given if each is not None and each.rows), None)
        own = rows_in(source.artifact.path)[0] if source else 0
        if isinstance(config, ReportConfig) and source:
            return self._report(work, config, made, inputs, source)
        if isinstance(getattr(config, "rows", None), int):
            return self._scored(work, config, made, inputs)
        taken = self._take(work, config, inputs)
        if not taken.names:
            self._pieces[made.path] = Piece(taken.made, 0, 0)
            times = source.rows / own if source and own else 1.0
            return self._alone(made, taken, lambda root: self._halved(work, config, inputs, root), times, [])
        done = min(len(taken.names), self._shards)
        rows, tests = rows_in(taken.made.path)
        times = source.rows / max(rows, 1) if source else len(taken.names) / done
        in_all = source or Piece(taken.made, rows * times, tests * times)
        piece = taken.made
        if source is None:
            piece = cut(piece, storage.join(self._scratch, "cut"), shard_names(piece.path), self._sizes.rows)
        self._pieces[made.path] = in_all._replace(artifact=piece)
        left = _left(made, len(taken.names) if source is None else 0)
        notes = [] if times <= 1 else [f"{rows:,.0f} of {in_all.rows:,.0f} rows"]
        if source is None and times > 1:
            notes = [f"{done} of {len(taken.names):,} shards, as the corpus is listed; its rows are counted by them"]
        if left < 1:
            notes.append(f"{1 - left:.0%} of it is there already")
        return self._by_shards(made, taken, times * left, rows, notes)

    def _by_shards(self, made: Planned, taken: Taken, times: float, rows: float, notes: list[str]) -> Estimate:
        """A step whose actors tell what each shard took; where they are none, all of it is taken for rows."""
        warm = [each for each in taken.paces if not each.first] or taken.paces
        of_all = rows / max(1, sum(each.rows for each in warm))
        spent = sum(each.cpu_seconds for each in warm) * of_all
        seconds = sum(each.seconds for each in warm) * of_all / max(1, min(self._cluster.actors[1], len(taken.paces)))
        if not warm:
            spent, seconds = taken.cpu_seconds, taken.seconds
            if times > 1:
                notes.append("its pace was not seen apart from its start, so it is told too slow")
        return self._estimate(
            made, taken, [(seconds, times)], [(spent, times)], rows / max(seconds, 1e-9), times, notes
        )

    def _report(
        self, work: Step, config: ReportConfig, made: Planned, inputs: Sequence[Artifact | None], images: Piece
    ) -> Estimate:
        """The last step has four parts, each of which grows with something else; done again, it loads nothing anew."""
        taken = self._take(work, config, inputs)
        self._pieces[made.path] = Piece(taken.made, 0, 0)
        own, tests = rows_in(images.artifact.path)
        there, in_all = (max(1, min(config.rows, round(each))) for each in (tests, images.tests))
        rebuilt = max(1, min(config.rebuilt, in_all)) / max(1, min(config.rebuilt, there))
        times = [in_all / there, rebuilt, 1.0, images.rows / max(own, 1)]
        if max(times) <= 1:
            return self._estimate(made, taken, [], [], 0.0, 1.0, [])
        again = self._take(work, config, inputs, "again")
        ends = [Mark(0, 4, 0.0, 0.0), *(mark for mark in again.marks if mark.done)]
        notes = [f"{there:,} of about {in_all:,} rows, and captions of {own:,} of {images.rows:,.0f}"]
        seconds, spent = (
            [
                (after - before, n)
                for (before, after), n in zip(pairwise(getattr(mark, name) for mark in ends), times, strict=True)
            ]
            for name in ("seconds", "cpu_seconds")
        )
        return self._estimate(made, taken, seconds, spent, 0.0, 1.0, notes)

    def _scored(self, work: Step, config: Any, made: Planned, inputs: Sequence[Artifact | None]) -> Estimate:
        """A step in the command's process that takes as many rows as its config says."""
        rows = min(config.rows, SCORED)
        taken = self._take(work, replace(config, rows=rows), inputs)
        self._pieces[made.path] = Piece(taken.made, 0, 0)
        notes = [f"{rows:,} of {config.rows:,} rows"] if config.rows > rows else []

        def again(root: str) -> Taken:
            return self._take(work, replace(config, rows=max(1, rows // 2) if root == "half" else rows), inputs, root)

        return self._alone(made, taken, again, config.rows / rows, notes)

    def _halved(self, work: Step, config: Any, inputs: Sequence[Artifact | None], root: str) -> Taken:
        if root == "half":
            place, rows = storage.join(self._scratch, "halves"), max(1, self._sizes.rows // 2)
            inputs = [
                cut(each, place, shard_names(each.path), rows) if each is not None and has_rows(each) else each
                for each in inputs
            ]
        return self._take(work, config, inputs, root)

    def _alone(self, made: Planned, taken: Taken, again: Any, times: float, notes: list[str]) -> Estimate:
        """What is done twice more, once by half, since the first time also loads what it needs."""
        if times <= 1:
            return self._estimate(made, taken, [], [], 0.0, 1.0, notes)
        full, half = again("again"), again("half")
        spent = min(full.cpu_seconds, max(0.0, 2 * (full.cpu_seconds - half.cpu_seconds)))
        seconds = min(full.seconds, max(0.0, 2 * (full.seconds - half.seconds)))
        return self._estimate(made, taken, [(seconds, times)], [(spent, times)], 0.0, 1.0, notes)

    def _affordable(self, config: Any, server: EndpointConfig, inputs: Sequence[Artifact | None]) -> list[Any]:
        """The inputs, cut to the rows that may be asked for."""
        asked = len(check_asked(config, server)) * self._shards
        rows = min(self._sizes.rows, max(1, self._cluster.max_requests // asked))
        place = storage.join(self._scratch, "asked")
        return [cut(e, place, shard_names(e.path), rows) if e is not None and has_rows(e) else e for e in inputs]

    def _put_texts(
        self, work: Step, config: Any, server: EndpointConfig, made: Planned, given: Sequence[Piece | None]
    ) -> None:
        images, inputs = given[0], [None if each is None else each.artifact for each in given]
        assert images is not None, "captions are of pictures"
        texts = stand_in(work, made, inputs, check_asked(config, server), storage.join(self._scratch, "texts"))
        self._pieces[made.path] = images._replace(artifact=texts)

    def _estimate(
        self,
        made: Planned,
        taken: Taken,
        seconds: Sequence[tuple[float, float]],
        spent: Sequence[tuple[float, float]],
        speed: float,
        grows: float,
        notes: Sequence[str],
    ) -> Estimate:
        return Estimate(
            step=taken.made.step,
            id=made.id,
            seconds=round(whole(taken.seconds, seconds), 2),
            cpu_seconds=round(whole(taken.cpu_seconds, spent), 2),
            images_per_second=round(speed, 3),
            fixed_cpu_seconds=round(max(0.0, taken.cpu_seconds - sum(part for part, _ in spent)), 2),
            peak_memory_gb=taken.made.manifest["peak_memory_gb"],
            worker_memory_gb=round(taken.worker_gb, 3),
            gpu_memory_gb=round(taken.gpu_gb, 3),
            cache_bytes=round(grows * sum(file.size for file in storage.listing(taken.made.path))),
            probe_cpu_seconds=taken.cpu_seconds,
            notes=tuple(notes),
        )


def probe(recipe: Recipe, root: str, cluster: Cluster, sizes: Sizes) -> list[Estimate]:
    """What each step that is not done in the store at `root` will take; nothing is left behind, there or elsewhere."""
    before = _ray_is_up()
    with tempfile.TemporaryDirectory(prefix="rescribe-probe-", ignore_cleanup_errors=True) as scratch:
        try:
            with explained(scratch, local=True):
                store = ProbeStore(root, cluster, scratch, sizes)
                recipe.run(store)
            return store.estimates
        finally:
            if not before and _ray_is_up():
                import ray

                ray.shutdown()  # what was stopped may still write there


def told_of(options: Any) -> dict[str, Any]:
    """Probe as a line of `plan` says, print what it found, and return it as data."""
    sizes = Sizes(steps=options.probe_steps, rows=options.probe_rows)
    if options.price < 0:
        raise ValueError(f"The price of an hour must not be negative, but it is {options.price:g}.")
    estimates = probe(options.recipe, options.store, options.cluster, sizes)
    for line in lines(estimates, options.price):
        print(line)
    if options.cluster.address:
        say("CPU-seconds and memory are those of this machine: others of the cluster are not seen.")
    known = [each for each in estimates if not each.failed]
    seconds = sum(each.seconds for each in known)
    return {
        "steps": [each.told() for each in estimates],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(sum(each.cpu_seconds for each in known), 2),
        "hours": round(seconds / 3600, 4),
        **({"cost": round(options.price * seconds / 3600, 4)} if options.price else {}),
    }


def shortened(config: Any, steps: int) -> Any:
    """A config whose trainings have no more than so many steps, one checkpoint, and are looked at more often."""
    changed: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, TrainConfig) and value.steps > steps:
            often = max(1, min(value.log_every_steps, steps // MARKS))
            changed[field.name] = replace(value, steps=steps, save_every_steps=steps, log_every_steps=often)
        elif is_dataclass(value) and (inner := shortened(value, steps)) != value:
            changed[field.name] = inner
    return replace(config, **changed) if changed else config


def _matched(trainings: Sequence[Trained], marks: Sequence[Mark]) -> list[list[Mark]]:
    """The marks of each training; none of one that was over before it was looked at."""
    found, left = list[list[Mark]](), [*segments(marks)]
    for training in trainings:
        fits = left and left[0][0].total == training.config.steps
        found.append(left.pop(0) if fits else [])
    return found


def _served(work: Step, inputs: Sequence[Artifact | None]) -> EndpointConfig | None:
    """The server that a step asks for captions."""
    for each in inputs if work.name == "recaption" else ():
        if each is not None and each.step == "train_captioner":
            backend = named(each)
            return backend if isinstance(backend, EndpointConfig) else None
    return None


def _left(made: Planned, shards: int) -> float:
    """The share of its shards that no earlier run made, of this artifact or of one that they are taken over from."""
    there = {*shard_names(made.path)}
    if foreseen := made.foreseen:
        return sum(record is None and name not in there for name, record in foreseen.items()) / len(foreseen)
    return 1 - len(there) / max(shards, len(there)) if shards else 1.0


def _ray_is_up() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)
