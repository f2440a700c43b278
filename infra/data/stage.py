"""The stage contract: a step over rows says which columns it reads and writes and what it needs."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

ACCEPTED = "accepted"
REJECTED = "rejected"  # the row itself is unfit, and the reason says why
FAILED = "failed"  # something went wrong on the way; to try again may help

Columns = dict[str, list[Any]]


@runtime_checkable
class Stage(Protocol):
    """A small picklable object that turns columns into new columns, a batch at a time, within one actor.

    `reads` may name columns of the inputs, what earlier stages wrote, and the virtual columns `image` (encoded bytes)
    and `pixels` ((H, W, 3) uint8). `cpus` and `gpus` are what one actor needs, counted as Ray counts.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    cpus: float
    gpus: float

    def setup(self) -> None:
        """Load models; called once in the actor, before the first batch."""
        ...

    def __call__(self, batch: Columns) -> Columns:
        """Return the `writes` columns for a batch that holds only accepted rows.

        "state" and "reason" may come with them, to reject rows (None means fine). If the call raises, the rows are
        tried one by one, and those that raise again are recorded as failed.
        """
        ...


def run_batch(stages: Sequence[Stage], batch: Columns) -> Columns:
    """Run stages over a batch with `state` and `reason` columns; return these and all `writes` columns.

    Rows that are not accepted, or cease to be, have None in the columns that were not written for them.
    """
    columns = dict(batch)
    columns["state"], columns["reason"] = list(batch["state"]), list(batch["reason"])
    for stage in stages:
        _run_stage(stage, columns)
    written = [name for stage in stages for name in stage.writes]
    return {name: columns[name] for name in dict.fromkeys(["state", "reason", *written])}


def _run_stage(stage: Stage, columns: Columns) -> None:
    states, reasons = columns["state"], columns["reason"]
    rows = [row for row, state in enumerate(states) if state == ACCEPTED]
    for name in stage.writes:
        columns[name] = [None] * len(states)
    if not rows:
        return
    batch = {name: [columns[name][row] for row in rows] for name in stage.reads}
    for position, result in enumerate(_call(stage, batch, len(rows))):
        row = rows[position]
        if isinstance(result, Exception):
            message = " ".join(str(result).split())[:500]
            states[row], reasons[row] = FAILED, f"{type(stage).__name__}: {type(result).__name__}: {message}"
            continue
        if result.get("state") not in (None, ACCEPTED):
            states[row], reasons[row] = result["state"], result.get("reason") or type(stage).__name__
        for name in stage.writes:
            columns[name][row] = result[name]


def _call(stage: Stage, batch: Columns, rows: int) -> list[dict[str, Any] | Exception]:
    try:
        output = stage(batch)
    except Exception as error:
        if rows == 1:
            return [error]
        singles = [{name: [values[row]] for name, values in batch.items()} for row in range(rows)]
        return [_call(stage, single, 1)[0] for single in singles]
    for name in (*stage.writes, *(name for name in ("state", "reason") if name in output)):
        assert name in output, f"{type(stage).__name__} promised the column {name!r} and did not return it"
        found = len(output[name])
        assert found == rows, f"{type(stage).__name__} returned {found} values of {name!r} for {rows} rows"
    return [{name: values[row] for name, values in output.items()} for row in range(rows)]
