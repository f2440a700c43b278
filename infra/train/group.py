"""One group of training workers on Ray Train, from its start to its end."""

import contextlib
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
from infra.train.worker import Job, work

LOOK_SECONDS = 0.3  # between two looks at a group
SPARE_SECONDS = 4  # until a spare process is asked for, and between two
GATHER_SECONDS = 3  # after a new place for a worker was found: others may be about to come


class Group:
    """One group of workers on Ray Train, from its start to its end."""

    def __init__(self, job: Job, number: int, board: Any, size: int, nodes: list[str], wanted: int) -> None:
        self.number, self.size, self.nodes = number, size, nodes
        self.why = ""  # it was told to leave
        self._training_since = 0.0
        self._job, self._board, self._wanted = job, board, wanted
        self._failures: Mapping[int, BaseException] = {}

    def run(
        self, report: Report, notice: Notice, say: Teller, first_step: Callable[[], None]
    ) -> Mapping[int, BaseException]:
        """Start it and see it through; returns the failures of its workers by rank, none where it ended well."""
        import ray

        ray.get(self._board.open.remote(self.number))
        training = threading.Thread(target=self._fit, daemon=True)  # beside the thread that signals come to
        training.start()
        room = Room(self._job.cluster, self._wanted - self.size)
        try:
            while training.is_alive():
                training.join(LOOK_SECONDS)
                if notice.given() and not self._training_since:
                    break  # nothing is lost with a group that has only begun to start
                words = ray.get(self._board.read.remote())
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
        return self._failures

    def _fit(self) -> None:
        import ray.cloudpickle

        from infra.train import trainer

        # Bytes: Ray Train's controller would otherwise import the model's libraries only to hand the job on.
        job = ray.cloudpickle.dumps(self._job)  # pyright: ignore[reportPrivateImportUsage]
        arguments = {"job": job, "group": self.number, "board": self._board}
        variables = spare.VARIABLES if self._job.cluster.address else {}
        self._failures, why = trainer.run(work, arguments, self._job.cluster, self.size, self.nodes, variables)
        self.why = why or self.why

    def _spare(self, training: threading.Thread, nodes: list[str]) -> None:
        """Processes for the group after this one; without them it only starts later."""
        import ray

        def goes_on() -> bool:
            training.join(SPARE_SECONDS)
            return training.is_alive()

        with contextlib.suppress(Exception):
            environment: Any = ray.get(self._board.environment.remote())
            spare.ask(nodes, environment, self._job.cluster.feed_tasks, goes_on)

    def _show(self, words: list[tuple[Beat, float]], report: Report) -> None:
        for beat, _ in words:
            if beat.rank == 0 and beat.figures:
                losses = {name: value for name, value in beat.figures.items() if is_loss(name)}
                report(beat.step, self._job.trainings[beat.training].config.steps, "steps", **losses)

    def _why_leave(self, words: list[tuple[Beat, float]], room: "Room", notice: Notice) -> str:
        if notice.given():
            return "told to stop"
        if self._training_since and room.leaves({beat.node for beat, _ in words}):
            return "a node is taken away"
        if self._training_since and time.monotonic() - self._training_since > self._job.cluster.grow_seconds:
            return "there is room for more workers" if room.grows() else ""
        return ""

    def _kill(self) -> None:
        import ray

        for handle in ray.get(self._board.handles.remote()):
            ray.kill(handle)


class Room:
    """Whether the cluster is about to take nodes away, or has places for more workers; nothing on one's own machine."""

    def __init__(self, cluster: Cluster, more: int) -> None:
        self._cluster, self._more = cluster, more
        self._seats: Any = None
        self._found, self._since = 0, 0.0

    def leaves(self, nodes: set[str]) -> bool:
        from infra.train.seats import draining

        return self._cluster.address is not None and bool(draining() & nodes)

    def grows(self) -> bool:
        from infra.train.seats import Seats

        if self._more < 1:
            return False
        if self._seats is None:  # only now: the group has its own places
            self._seats = Seats(self._cluster.worker_resources, self._more)
        if len(self._seats.found()) > self._found:
            self._found, self._since = len(self._seats.found()), time.monotonic()
        return self._found > 0 and time.monotonic() - self._since > GATHER_SECONDS

    def close(self) -> None:
        if self._seats is not None:
            self._seats.free()
