"""One group of training workers on Ray Train, from its start to its end."""

import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from infra.cluster import Cluster
from infra.metrics import Report
from infra.notice import Notice, Teller
from infra.train import spare
from infra.train.board import Beat, silence
from infra.train.loop import is_loss
from infra.train.restarts import root
from infra.train.seats import Seats, alive, draining
from infra.train.worker import Job, work

LOOK_SECONDS = 0.3  # between two looks at a group
SPARE_SECONDS = 4  # until a spare process is asked for, and between two
GATHER_SECONDS = 3  # after a new place for a worker was found: others may be about to come
STOPPED = "told to stop"
GROWS = "there is room for more workers"
TAKEN = "its places were taken by others"


class Group:
    """One group of workers on Ray Train, from its start to its end."""

    def __init__(
        self,
        job: Job,
        number: int,
        board: Any,
        size: int,
        nodes: list[str],
        growth: "Growth",
        held: contextlib.ExitStack,
        left_out: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        """`held` is closed once the workers sit in their places, or never will; `left_out` are nodes to do without."""
        self.number, self.size, self.nodes = number, size, nodes
        self.why = ""  # it was told to leave
        self._training_since, self._left_out, self._killed = 0.0, left_out, False
        self._where: dict[int, str] = {}  # the node of each worker that came in
        self._job, self._board, self._growth, self._held = job, board, growth, held
        self._failures: Mapping[int, BaseException] = {}
        self._controller: Any = None

    def run(
        self, report: Report, notice: Notice, say: Teller, first_step: Callable[[], None]
    ) -> Mapping[int, BaseException]:
        """Start it and see it through; returns the failures of its workers by rank, none where it ended well."""
        import ray

        ray.get(self._board.open.remote(self.number, self.size))
        training = threading.Thread(target=self._fit, daemon=True)  # beside the thread that signals come to
        training.start()
        room = Room(self._job.cluster, self._growth.most - self.size, self._left_out)
        try:
            while training.is_alive():
                training.join(LOOK_SECONDS)
                if notice.given() and not self._training_since:
                    self.why = STOPPED
                    break  # nothing is lost with a group that has only begun to start
                words = ray.get(self._board.read.remote())
                self._where = {beat.rank: beat.node for beat, _ in words}
                if any(beat.pid for beat, _ in words):
                    self._held.close()
                self._show(words, report)
                if not self._training_since and any(beat.made for beat, _ in words):
                    self._training_since = time.monotonic()
                    first_step()
                    if self._job.cluster.address:
                        nodes = [beat.node for beat, _ in words]
                        threading.Thread(target=self._spare, args=(training, nodes), daemon=True).start()
                if not self.why and (why := self._why_leave(words, room, notice)):
                    self.why = why
                    self._board.leave.remote()
                if (found := silence(words, self._job.cluster.stall_seconds)) is not None:
                    say(found[0] + (" Its group is started anew." if found[1] else ""))
                    if found[1]:
                        self._kill()
        except BaseException:
            self._kill()  # a second Ctrl-C
            raise
        finally:
            room.close()
            self._held.close()
        return self._failures

    def blamed(self) -> str:
        """The node where the worker sat that fell first; nothing where that is not known, as after a hang."""
        cause = root(self._failures)
        ranks = [rank for rank, failure in self._failures.items() if failure is cause]
        return self._where.get(ranks[0], "") if ranks and not self._killed else ""

    def _fit(self) -> None:
        """In a thread of its own: whatever is raised is a failure of the group."""
        try:
            import ray.cloudpickle

            from infra.train import trainer

            # Bytes: Ray Train's controller would otherwise import the model's libraries only to hand the job on.
            job = ray.cloudpickle.dumps(self._job)  # pyright: ignore[reportPrivateImportUsage]
            arguments = {"job": job, "group": self.number, "board": self._board}
            variables = spare.VARIABLES if self._job.cluster.address else {}
            place = (self._job.cluster, self.size, self.nodes, variables)
            self._failures, placed = trainer.run(work, arguments, *place, begun=self._begun)
            self.why = self.why if placed else TAKEN
        except Exception as error:
            self._failures = {-1: error}

    def _begun(self, controller: Any) -> None:
        self._controller = controller

    def _spare(self, training: threading.Thread, nodes: list[str]) -> None:
        """Processes for the group after this one; without them it only starts later."""
        import ray

        def goes_on(seconds: float = SPARE_SECONDS) -> bool:
            training.join(seconds)
            return training.is_alive()

        with contextlib.suppress(Exception):
            environment: Any = ray.get(self._board.environment.remote())
            spare.ask(nodes, environment, self._job.cluster.feed_tasks, goes_on)
            while goes_on(spare.SECONDS):
                spare.ask(nodes, environment, self._job.cluster.feed_tasks, goes_on)

    def _show(self, words: list[tuple[Beat, float]], report: Report) -> None:
        for beat, _ in words:
            if beat.rank == 0 and beat.figures:
                losses = {name: value for name, value in beat.figures.items() if is_loss(name)}
                report(beat.step, self._job.trainings[beat.training].config.steps, "steps", **losses)

    def _why_leave(self, words: list[tuple[Beat, float]], room: "Room", notice: Notice) -> str:
        if notice.given():
            return STOPPED
        if self._training_since and room.leaves({beat.node for beat, _ in words}):
            return "a node is taken away"
        if self._training_since and time.monotonic() - self._training_since > self._growth.seconds():
            return GROWS if room.grows() else ""
        return ""

    def _kill(self) -> None:
        import ray

        self._killed = True
        for handle in ray.get(self._board.handles.remote()):
            ray.kill(pickle.loads(handle))
        if self._controller is not None and not self._training_since:
            ray.kill(self._controller)  # of workers that never came in there are no handles


class Growth:
    """How long a group trains before it makes room for more workers, `most` in all.

    Twice as long after each time that came to nothing, as where the CPU that seemed free was one that feeds the
    workers, or another was faster; and no longer than at first once other nodes are there.
    """

    def __init__(self, seconds: float, most: int, nodes: Callable[[], frozenset[str]] = alive) -> None:
        self.most = most
        self._seconds, self._nodes = seconds, nodes
        self._vain, self._there = 0, frozenset[str]()

    def seconds(self) -> float:
        """Of training, at the least."""
        if not self._vain or self._nodes() != self._there:
            return self._seconds
        return self._seconds * 2 ** min(self._vain, 7)

    def came(self, before: int, after: int) -> None:
        """Workers of the group that made room, and of the one after it."""
        self._vain = 0 if after > before else self._vain + 1
        self._there = self._nodes()


class Room:
    """Whether the cluster is about to take nodes away, or has places for more workers."""

    def __init__(self, cluster: Cluster, more: int, left_out: Callable[[], frozenset[str]] = frozenset) -> None:
        self._cluster, self._more, self._left_out = cluster, more, left_out
        self._seats: Any = None
        self._found, self._since = 0, 0.0

    def leaves(self, nodes: set[str]) -> bool:
        return self._cluster.address is not None and bool(draining() & nodes)

    def grows(self) -> bool:
        if self._more < 1:
            return False
        if self._seats is None or self._seats.left_out != self._left_out():  # only now: the group has its own places
            self.close()
            self._seats, self._found = Seats(self._cluster.worker_resources, self._left_out()), 0
            self._seats.ask(self._more)
        if len(self._seats.found()) > self._found:
            self._found, self._since = len(self._seats.found()), time.monotonic()
        return self._found > 0 and time.monotonic() - self._since > GATHER_SECONDS

    def close(self) -> None:
        if self._seats is not None:
            self._seats.free()
