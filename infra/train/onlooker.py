"""Who looks on while trainings train: an actor beside them that measures the checkpoints which they commit."""

import os
import pickle
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from infra import device, storage
from infra.notice import Teller
from infra.train import checkpoint, held_out
from infra.train.restarts import sentence
from infra.train.worker import Training

FIRST_SECONDS = 60.0  # of a training, until it is looked at: what is over sooner costs nothing
LOOK_SECONDS = 5.0  # between two looks for a checkpoint
EVERY_SECONDS = 60.0  # from one look to the next, at least,
SHARE = 20  # so many times the CPU-seconds that the last one took,
PARTS = 30  # and one in so many of the time that a training has taken: a long one is looked at some hundreds of times
LAST_SECONDS = 60.0  # that the last look at what is trained may keep the driver
NICE = 10  # a tenth of what a worker gets of a core that both want


class Eye:
    """Lives in an actor of its own, on a core's leavings; it reads checkpoints, and nobody waits for it."""

    def __init__(self, trainings: bytes, count: int) -> None:
        os.nice(NICE)
        self._trainings: list[Training] = pickle.loads(trainings)
        self._count, self._since = count, 0.0  # the start of the process counts, too
        self._seen: held_out.Seen | None = None

    def look(self, number: int, step: int) -> float | None:
        """Measure a checkpoint of a training; the CPU-seconds that it took, None where no row is held out."""
        if self._seen is None or self._seen.training is not self._trainings[number]:
            self.close()
            self._seen = held_out.Seen(self._trainings[number], self._count)
        if not len(self._seen.rows):
            return None
        self._seen.look(step, self._since)
        before, self._since = self._since, time.process_time()
        return self._since - before

    def close(self) -> None:
        """Write what is left."""
        if self._seen is not None:
            self._seen.close()


class Onlooker:
    """A context in which trainings, one after another, are looked at, each from its first minute on.

    A thread lists checkpoints, and an actor that asks for no CPU is there once one is to be measured. Nothing waits for
    them but the end of the context, for LAST_SECONDS at most, and only where the last training was looked at. What goes
    wrong is said once, and training goes on.
    """

    def __init__(self, trainings: Sequence[Training], count: int) -> None:
        """`count` held-out rows are measured; 0: nobody looks."""
        self._trainings, self._count, self._say = trainings, count, Teller()
        self._begun, self._over, self._until = threading.Event(), threading.Event(), 0.0
        self._eye: Any = None
        self._thread = threading.Thread(target=self._work, name="onlooker", daemon=True)

    def __enter__(self) -> "Onlooker":
        if self._count and any(held_out.has_held_out(training.task) for training in self._trainings):
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        seconds = LAST_SECONDS if kind is None else 0.0
        self._until = time.monotonic() + seconds
        self._over.set()
        self._begun.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
            if kind is None and self._thread.is_alive():
                self._say(f"The last checkpoint was not measured within {seconds:g} s, and is left out.")
        if self._eye is not None:
            import ray

            with suppress(Exception):  # Ray may have gone before
                ray.kill(self._eye)

    def begin(self) -> None:
        """The first of the trainings has made a step."""
        self._begun.set()

    def _work(self) -> None:
        self._begun.wait()
        for number, training in enumerate(self._trainings):
            self._attend(number, training)
        if self._eye is not None:
            with suppress(Exception):
                self._ask(self._eye.close.remote())

    def _attend(self, number: int, training: Training) -> None:
        """Look at a training now and then, until it is trained, and once more then."""
        trained, looked, wanted = False, False, held_out.has_held_out(training.task)
        seen, began = -1, time.monotonic()
        due = began + FIRST_SECONDS
        while not trained:
            over = self._over.wait(LOOK_SECONDS)
            try:
                trained = training.finished()
                if wanted and (looked if trained else time.monotonic() >= due):
                    seen = held_out.last_step(training) if seen < 0 else seen
                    if (step := checkpoint.reached(training.checkpoints)) > seen:
                        cost = self._ask(self._opened().look.remote(number, step))
                        seen, looked, wanted = step, True, cost is not None
                        now = time.monotonic()
                        due = now + max(EVERY_SECONDS, SHARE * (cost or 0), (now - began) / PARTS)
            except (FileNotFoundError, storage.UnavailableError):
                pass  # a checkpoint that is kept no longer, a store that is away: the next one will do
            except Exception as error:
                wanted = False
                if not self._late():
                    told = sentence(getattr(error, "cause", None) or error)
                    self._say(f"Nobody looks at what is held out any more: {told} Training goes on.")
            if over:
                return

    def _opened(self) -> Any:
        """The actor, on the driver's node."""
        import ray.cloudpickle

        if self._eye is None:
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            # No process is taken for it that did something else before, whose seconds would count.
            environment = {"env_vars": device.variables(0) | {"OMP_NUM_THREADS": "1"}}
            trainings = ray.cloudpickle.dumps(self._trainings)  # pyright: ignore[reportPrivateImportUsage]
            self._eye = ray.remote(num_cpus=0, label_selector=here, runtime_env=environment)(Eye).remote(
                trainings, self._count
            )
        return self._eye

    def _ask(self, answer: Any) -> Any:
        """What the actor answers; TimeoutError where that takes longer than there is time."""
        import ray

        while not ray.wait([answer], timeout=0.5)[0]:
            if self._late():
                raise TimeoutError
        return ray.get(answer)

    def _late(self) -> bool:
        return self._over.is_set() and time.monotonic() >= self._until
