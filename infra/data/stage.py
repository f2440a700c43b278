"""The stage contract: a step over rows says which columns it reads and writes and what it needs."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from infra.data.clock import clocked
from infra.trouble import UnavailableError, is_device_error, is_out_of_memory

ACCEPTED = "accepted"
REJECTED = "rejected"  # the row itself is unfit, and the reason says why
FAILED = "failed"  # something went wrong on the way; to try again may help
DEVICE = "device_error"  # the kind of trouble after which a process can do nothing more on its GPU

Columns = dict[str, list[Any]]


class DeviceError(RuntimeError):
    """The device is of no more use to this process, and which row is to blame, if any is, it cannot tell.

    Nothing is noted of the rows; the message is the reason of a row that is found to be at fault.
    """


@runtime_checkable
class Stage(Protocol):
    """A small picklable object that turns columns into new columns, a batch at a time, within one actor.

    `reads` may name columns of the inputs, what earlier stages wrote, and the virtual columns `image` (encoded
    bytes) and `pixels` ((H, W, 3) uint8). `cpus` and `gpus` are what one actor needs, counted as Ray counts. A
    stage may have `types`, the names of Arrow types by column it writes; others are inferred, which a shard of None
    defeats. It may have `summed`, columns of numbers, and `counted`, columns of few values, whose sums and counts
    go into the shard's record to be summed without reading it; and `views`, functions of decoded `pixels` by
    virtual columns of its own naming, which it reads in place of them: they are called in threads, ahead of the
    stage, and whole pictures are let go. A stage that is to see pictures as the corpus has them, where the index
    has copies, is `whole`, and then so do those beside it. A stage to which it is no matter which rows come
    together, and whose calls may take long, as those of a server, has `few`, the rows of its first call: further
    calls have as many more as take some seconds, so that little is lost where one is cut off. `optional` are
    columns that only those shards have in which a row has a value of them. A type "double[]" is a list.
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

        "state" and "reason" may come with them, to reject rows (None means fine). An UnavailableError in the place of a
        row's state leaves the row undone, and ends the shard when what the others brought is kept. If the call raises,
        its rows are tried in halves, and those that raise alone are recorded as failed; UnavailableError ends the
        shard, and an error of the device (`kind_of`) the process.
        """
        ...


class Runner:
    """Takes batches through stages, one after another, in one actor.

    Where a batch does not fit into memory it is halved, the same rows are tried again, and later batches are cut as
    small from the start; the size grows back by half each time that enough batches have passed.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._fits: dict[int, _Size] = {number: _Size() for number in range(len(stages))}
        self.cost = (0, 0)  # FLOPs of the first batch, and its rows

    def __call__(self, batch: Columns) -> Columns:
        """Run a batch with `state` and `reason` columns; return these and all `writes` columns.

        Rows that are not accepted, or cease to be, have None in the columns that were not written for them. DeviceError
        where a stage met an error of the device other than want of memory, or failed a row for one.
        """
        columns = dict(batch)
        columns["state"], columns["reason"] = list(batch["state"]), list(batch["reason"])
        # Nobody computes but by torch, as far as this sees: a server or vLLM counts for nothing.
        counted = not self.cost[1] and ACCEPTED in columns["state"] and "torch" in sys.modules
        with _counting() if counted else nullcontext() as count:
            for number, stage in enumerate(self._stages):
                _run_stage(stage, columns, self._fits[number])
        if count is not None:
            self.cost = (count.flops + count.frozen, batch["state"].count(ACCEPTED))
        written = [name for stage in self._stages for name in stage.writes]
        return {name: columns[name] for name in dict.fromkeys(["state", "reason", *written])}


class _Size:
    """The most rows that a stage takes at once."""

    GROW_AFTER = 8  # batches without trouble

    def __init__(self) -> None:
        self.most: int | None = None  # None: nothing was ever too large
        self._passed = 0

    def shrink(self, tried: int) -> None:
        self.most, self._passed = max(1, tried // 2), 0

    def passed(self, rows: int) -> None:
        if self.most is not None and rows >= self.most:
            self._passed += 1
            if self._passed >= self.GROW_AFTER:
                self.most, self._passed = self.most + max(1, self.most // 2), 0


def kind_of(error: BaseException) -> str:
    """What sort of trouble an error is, in a word by which its rows can be tried again."""
    if is_out_of_memory(error):
        return "oom"
    if isinstance(error, DeviceError) or is_device_error(error):
        return DEVICE
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError):
        return "read_error"
    return "error"


def describe_error(where: str, error: BaseException) -> str:
    """A failed row's reason: `<kind>: <stage>: <class of the error>: <its message>`."""
    kind = "decode_error" if where == "image" and isinstance(error, ValueError) else kind_of(error)
    return f"{kind}: {where}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _run_stage(stage: Stage, columns: Columns, size: _Size) -> None:
    states, reasons = columns["state"], columns["reason"]
    rows = [row for row, state in enumerate(states) if state == ACCEPTED]
    for name in stage.writes:
        columns[name] = [None] * len(states)
    batch = {name: [columns[name][row] for row in rows] for name in stage.reads}
    with clocked(type(stage).__name__):
        results = list(_call(stage, batch, len(rows), size))
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, Exception):
            states[row], reasons[row] = FAILED, describe_error(type(stage).__name__, result)
            continue
        if result.get("state") not in (None, ACCEPTED):
            states[row], reasons[row] = result["state"], result.get("reason") or type(stage).__name__
        for name in stage.writes:
            columns[name][row] = result[name]


def _call(stage: Stage, batch: Columns, rows: int, size: _Size) -> Iterator[dict[str, Any] | Exception]:
    """The results of the rows in order, or the errors of those that fail even alone."""
    start = 0
    while start < rows:
        count = min(rows - start, size.most or rows)
        part = {name: values[start : start + count] for name, values in batch.items()}
        try:
            output = stage(part)
        except UnavailableError:
            raise  # no fault of these rows
        except Exception as error:
            kind = kind_of(error)
            if kind == DEVICE:  # every later call would raise, whatever its rows
                raise DeviceError(describe_error(type(stage).__name__, error)) from error
            if kind == "oom":
                _free()
                size.shrink(count)
                if count > 1:
                    continue  # the same rows, fewer at once
            if count == 1:
                yield error
            else:  # some row is bad: halves find it in few calls
                half = count // 2
                for low, high in ((0, half), (half, count)):
                    yield from _call(stage, {n: v[low:high] for n, v in part.items()}, high - low, size)
        else:
            size.passed(count)
            yield from _rows(stage, output, count)
        start += count


def _rows(stage: Stage, output: Columns, rows: int) -> list[dict[str, Any]]:
    for name in (*stage.writes, *(name for name in ("state", "reason") if name in output)):
        assert name in output, f"{type(stage).__name__} promised the column {name!r} and did not return it"
        found = len(output[name])
        assert found == rows, f"{type(stage).__name__} returned {found} values of {name!r} for {rows} rows"
    found = [{name: values[row] for name, values in output.items()} for row in range(rows)]
    for row in found if stage.gpus else ():  # a stage may catch the error and tell it of a row; a server, its own
        if row.get("state") == FAILED and is_device_error(RuntimeError(row.get("reason"))):
            raise DeviceError(f"{DEVICE}: {type(stage).__name__}: {row['reason']}")
    return found


def _counting() -> AbstractContextManager[Any]:
    from infra.train.flops import counting  # imports torch, which many stages do without

    return counting()


def _free() -> None:
    """Give back what the failed attempt still holds on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
