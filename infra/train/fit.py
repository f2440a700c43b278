"""Train Tasks on Ray Train: groups of as many workers as there is room for, one after another until all is trained."""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from infra import storage, strict
from infra.cluster import Cluster, connect
from infra.metrics import FLOPS, Report
from infra.notice import Notice, Teller
from infra.train import checkpoint, held_out
from infra.train.board import Board
from infra.train.limits import Limits
from infra.train.onlooker import Onlooker
from infra.train.restarts import Faults, Restarts, root, sentence
from infra.train.turn import DoesNotFitError
from infra.train.worker import FINISHED, Job, Training

if TYPE_CHECKING:
    from infra.train.group import Group

PAUSES = (1, 5, 15, 30, 60)  # seconds between questions to a store that is away

__all__ = ["Training", "fit"]


def fit(trainings: Sequence[Training], cluster: Cluster, report: Report) -> dict[str, Any]:
    """Train each task in turn and export it to its `<out>/model`; a task may begin from the model of one before.

    One group of workers trains them all: on a small machine its start takes longer than a small training. Each
    continues from the newest whole checkpoint under its `<out>/checkpoints`. A group ends when a worker or a node is
    lost, hangs, or is about to be taken away, or when there is room for more workers; the next one continues, with
    what there is. Where there is notice (SIGTERM, SIGINT, a node that is drained, growth), it saves first.

    Returns the figures that each training logged last, those of a later one over those of the same name of one before,
    and of `training_flops` and `frozen_flops` the sums over the trainings, where each says what it took.
    Where an Onlooker saw them, `held_out` has the last losses on rows that are held out, and `cpu_seconds`, what all
    such losses took. It changes no figure of a training.
    Raises RuntimeError, with the worker's own sentence, where training fails for good.
    """
    left = [training for training in trainings if not training.finished()]
    if left:
        counts = [each.count() for each in left]
        for each, rows in zip(left, counts, strict=True):
            each.plan(rows)  # no rows: said before anything starts
            cluster.check(each.config.precision, each.task.whole_weights)
        connect(cluster, cluster.workers_for(max(each.config.batch for each in left))[0])
        with Notice() as notice, Onlooker(left, cluster.held_out) as onlooker:
            _supervise(Job(left, counts, cluster), report, notice, onlooker)
    told = [storage.read_json(storage.join(training.out, FINISHED)) for training in trainings]
    figures: dict[str, Any] = {name: value for each in told for name, value in each.items()}
    figures = {name: value for name, value in figures.items() if name not in FLOPS}
    if all(FLOPS[0] in each for each in told):  # those of before say nothing
        figures |= {name: total for name in FLOPS if (total := sum(each.get(name, 0) for each in told))}
    seen = held_out.summary(trainings)
    return figures | ({"held_out": seen} if seen else {})


def _supervise(job: Job, report: Report, notice: Notice, onlooker: Onlooker) -> None:
    import ray  # slow to import, and so is what follows: `plan` does without

    from infra.train.group import GROWS, TAKEN, Group, Growth
    from infra.train.seats import spared, take

    cluster = job.cluster
    low, high = cluster.workers_for(max(training.config.batch for training in job.trainings))
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    board: Any = ray.remote(num_cpus=0, label_selector=here)(Board).remote()
    reached, say = _reached(job), Teller()
    restarts, faults, limits = Restarts(cluster.restarts, sum(reached)), Faults(), Limits(job.trainings, say)
    diary = _Diary(job.trainings[0].out, say)
    growth, group = Growth(cluster.grow_seconds, high), None

    def left_out() -> frozenset[str]:
        return spared(faults.bad(), cluster.worker_resources, low)

    for number in itertools.count():
        nodes, held = list[str](), ExitStack()
        if low < high or left_out():
            nodes, held = take(
                cluster.worker_resources, low, high,
                waiting=lambda: say(f"Training waits until there is room for {low} workers."),
                stopped=notice.given,
                left_out=left_out(),
            )  # fmt: skip
        notice.heed()
        if group and group.why == GROWS:
            growth.came(group.size, len(nodes))
        group = Group(
            replace(job, most=limits.most()), number, board, len(nodes) or high, nodes, growth, held, left_out
        )
        diary(group, "begins")
        failures = group.run(report, notice, say, partial(_first_step, diary, group, onlooker))
        diary(group, "ends", why=sentence(root(failures)) if failures else group.why or "all was trained")
        if failures and notice.given():
            say(f"{sentence(root(failures))} What was trained since the last checkpoint is not saved.")
        notice.heed()
        if not failures and _patiently(lambda: all(training.finished() for training in job.trainings), say):
            return
        if not failures and not group.why:
            failures = {-1: RuntimeError("A group of workers ended before all was trained, and none said why.")}
        if group.why == TAKEN:
            say(f"Training waits: the places of its {group.size} workers were taken by others.")
        before, reached = reached, _patiently(lambda: _reached(job), say)
        for training, start, end in zip(job.trainings, before, reached, strict=True):
            limits.passed(training.out, cluster.micro_batches(training.config.batch, group.size)[0], end - start)
        cause, known = root(failures), left_out()
        if isinstance(cause, DoesNotFitError):
            limits.failed(cause)
            continue
        faults.note(group.blamed(), cause)
        for node in (new := left_out() - known):
            say(f"Node {node} is left out for now, since groups of workers fell there.")
        if failures and not restarts.again(failures, sum(reached), elsewhere=bool(new)):
            raise RuntimeError(f"Training failed: {sentence(cause)}") from cause
        if failures:
            say(f"{sentence(cause)} Training goes on from what was saved last.")


def _first_step(diary: "_Diary", group: "Group", onlooker: Onlooker) -> None:
    diary(group, "first step")
    onlooker.begin()


def _reached(job: Job) -> list[int]:
    """Steps of each training that are committed."""
    return [
        training.config.steps + 1 if training.finished() else checkpoint.reached(training.checkpoints)
        for training in job.trainings
    ]


def _patiently(ask: Callable[[], Any], say: Teller) -> Any:
    """The answer of a store that may be away for a while: nothing could be saved meanwhile, so there is no hurry."""
    for pause in PAUSES:
        try:
            return ask()
        except storage.UnavailableError as error:
            say(str(error))
            time.sleep(pause)
    return ask()


class _Diary:
    """What befell the groups: a line an event in `groups.jsonl`, beside the scalars of the first training."""

    def __init__(self, out: str, say: Teller) -> None:
        self._url, self._say = storage.join(out, "groups.jsonl"), say
        self._lines = storage.read_bytes(self._url) if storage.exists(self._url) else b""

    def __call__(self, group: "Group", event: str, **more: Any) -> None:
        line = {
            "at": round(time.time(), 3),
            "event": event,
            "workers": group.size,
            "on": sorted(set(group.nodes)),
            **more,
        }
        self._lines += strict.dumps(line).encode() + b"\n"
        try:
            storage.write_bytes(self._url, self._lines)
        except OSError as error:  # training goes on; the next line brings this one
            self._say(str(error))
