"""How many rows a worker takes at once: half as many where memory was too small, and seldom more again."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from infra import storage
from infra.train.turn import DoesNotFitError
from infra.train.worker import Training

CALM_STEPS = 1000  # that a limit holds at least; twice as many after each time that it was raised


@dataclass
class _Limit:
    rows: int = 0  # at once, at most; 0: no limit
    steps: int = 0  # committed by groups that it bound
    wait: int = CALM_STEPS  # such steps until twice as many rows are tried


class Limits:
    """What was learned of each training, by its `out`; noted there, so that the same line given again knows it.

    It is policy: nothing of it changes a result. More rows are tried only where a group starts anyway, since a try that
    fails costs the steps since the last checkpoint.
    """

    def __init__(self, trainings: list[Training], say: Callable[[str], Any]) -> None:
        self._say, self._limits = say, {training.out: _Limit(**_read(training.out)) for training in trainings}

    def most(self) -> dict[str, int]:
        """Rows at once of the next group, by training."""
        return {out: limit.rows for out, limit in self._limits.items()}

    def failed(self, error: DoesNotFitError) -> None:
        """Take half as many rows from now on. RuntimeError where it was a single one."""
        if error.rows == 1:
            raise RuntimeError(
                f"Training failed: a single row does not fit: {error} Give --cluster.recompute True, a higher "
                "--cluster.zero-stage, or workers with more memory."
            )
        limit = self._limits[error.out]
        limit.rows, limit.steps = error.rows // 2, 0
        self._note(error.out)
        self._say(f"{error} From now on {limit.rows} are taken at once; the results are the same.")

    def passed(self, out: str, share: int, steps: int) -> None:
        """A group has committed so many steps of a training; without a limit it had taken `share` rows at once."""
        limit = self._limits[out]
        if not 0 < limit.rows < share or not steps:
            return  # nothing was learned of it
        limit.steps += steps
        if limit.steps >= limit.wait:
            limit.rows, limit.steps, limit.wait = 2 * limit.rows, 0, 2 * limit.wait
        self._note(out)

    def _note(self, out: str) -> None:
        try:
            storage.write_json(_place(out), asdict(self._limits[out]))
        except OSError as error:  # training goes on
            self._say(str(error))


def _place(out: str) -> str:
    return storage.join(out, "micro_batch.json")


def _read(out: str) -> dict[str, int]:
    try:
        return storage.read_json(_place(out))
    except (FileNotFoundError, ValueError):
        return {}
