"""One group of training workers on Ray Train, from its start to its end."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from infra.cluster import Cluster
from infra.metrics import Report
from infra.notice import Notice, Teller
from infra.train.board import Beat, silence
from infra.train.loop import is_loss
from infra.train.worker import Job, work

LOOK_SECONDS = 0.3  # between two looks at a group
GATHER_SECONDS = 3  # after a new place for a worker was found: others may be about to come
# Of Ray Train's controller, which inherits them from here: how often it looks at its workers, and how long it waits for
# a place that was there a moment ago.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # draining nodes are seen here


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
        import ray.train.torch  # slow to import: `--help` and `plan` do without

        from infra.train.meeting import keep_to_loopback

        class Backend(ray.train.torch.TorchConfig().backend_cls):
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(keep_to_loopback)
                super().on_start(worker_group, backend_config)

        class Config(ray.train.torch.TorchConfig):
            backend_cls: Any = Backend

        cluster = self._job.cluster
        # Ray Train's own run folder holds nothing that is needed again: checkpoints are ours, under `out`. So there is
        # no snapshot of its controller that could be torn.
        scratch = tempfile.mkdtemp(prefix="rescribe-train-")
        trainer = ray.train.torch.TorchTrainer(
            work,
            # Bytes: Ray Train's controller would otherwise import the model's libraries only to hand the job on.
            train_loop_config={
                "job": ray.cloudpickle.dumps(self._job),  # pyright: ignore[reportPrivateImportUsage]
                "group": self.number,
                "board": self._board,
            },
            torch_config=Config(backend=cluster.backend),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.size,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=cluster.worker_resources,
                # Where there was room a moment ago, not on a node that is dead and that Ray has not missed yet.
                label_selector=[{"ray.io/node-id": node} for node in self.nodes] or None,
            ),
            run_config=ray.train.RunConfig(
                name="run",
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(
                    max_failures=0, controller_failure_limit=0 if self.nodes else -1
                ),
            ),
        )
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            self._failures = {rank: _told(failure) for rank, failure in error.worker_failures.items()}
        except ray.train.ControllerError as error:
            if "Timeout" in type(error.controller_failure).__name__:
                self.why = "its places were taken by others"
            else:
                self._failures = {-1: error.controller_failure}
        except Exception as error:  # whatever befell the controller: the next group has another one
            self._failures = {-1: error}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

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


def _told(failure: BaseException) -> BaseException:
    """What the worker raised, out of what Ray Train wraps it in."""
    return getattr(failure, "_base_exc", failure)
