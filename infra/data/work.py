"""One shard through stages: its images are fetched, decoded and made ready in threads, ahead of the models."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from infra import device
from infra.data import wide
from infra.data.clock import clocked
from infra.data.columns import as_list, is_numbers
from infra.data.ledger import Ledger, counting
from infra.data.parts import Rows
from infra.data.revision import Redo
from infra.data.shards import OPTIONAL, VIRTUAL, ShardReader
from infra.data.stage import ACCEPTED, DEVICE, FAILED, Columns, Runner, Stage, describe_error, kind_of
from infra.trouble import UnavailableError

PICTURES_BYTES = 512 * 2**20  # of whole pictures that wait decoded; photographs of 12 megapixels take 36 MB each
CALL_SECONDS = 10  # that a call takes at most, if it may be cut


class Calls:
    """How many rows are handed over at once where it is no matter which come together: what takes some seconds.

    No fewer than `few`, which take no longer than one.
    """

    def __init__(self, few: int) -> None:
        self.rows = self._few = few

    def took(self, rows: int, seconds: float) -> None:
        """Learn from a call of so many rows."""
        if seconds > CALL_SECONDS:
            self.rows = max(self._few, rows // 2)
        elif rows >= self.rows and seconds < CALL_SECONDS / 4:
            self.rows *= 2


@dataclass
class StageWork:
    """Takes the accepted rows of a shard through stages in batches, their images decoded ahead.

    With `redo` it takes those rows alone that failed in an earlier revision, and keeps the others as they are there.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    batch_size: int
    redo: Redo | None = None
    runner: Runner | None = field(default=None, init=False, repr=False)
    calls: Calls | None = field(default=None, init=False, repr=False)

    def setup(self) -> None:
        """Set the stages up, on the device that they were given."""
        device.take(max(stage.gpus for stage in self.stages))
        self.load()

    def load(self) -> None:
        """Set the stages up on the device that this process has."""
        for stage in self.stages:
            stage.setup()
        self.runner = Runner(self.stages)  # it learns which batches fit into memory
        if few := [few for stage in self.stages if (few := getattr(stage, "few", 0))]:
            self.calls = Calls(min(few))

    def __call__(self, name: str) -> pa.Table:
        """All rows of the shard: those that were not accepted keep their state and reason."""
        shard = self.open(name)
        *_, (_, table) = shard.tables((0, len(shard.sample_ids)), lambda: False)
        return table

    def open(self, name: str) -> "StageShard":
        """A shard to be done in parts."""
        return StageShard(self, name)

    def counts(self) -> dict[str, int]:
        """The rows of each shard."""
        return {name: record["rows_in"] for name, record in Ledger(self.inputs[0]).complete().items()}


class StageShard:
    """One shard on its way through stages. Batches are cut as they are however its rows are shared out into parts."""

    def __init__(self, work: StageWork, name: str) -> None:
        self._work, self._reader = work, ShardReader(work.inputs, name)
        self.sample_ids = self._reader.sample_ids
        self._written = [column for stage in work.stages for column in stage.writes]
        self._states, self._reasons = list(self._reader.states), list(self._reader.reasons)
        self._columns: Columns = {column: [None] * len(self.sample_ids) for column in self._written}
        self._types: dict[str, pa.DataType] = {}
        self._todo = np.arange(len(self._reader))
        if work.redo:
            before = work.redo.table(name, self.sample_ids)
            self._states, self._reasons = before["state"].to_pylist(), before["reason"].to_pylist()
            self._columns |= {name: _values(before[name]) for name in self._written if name in before.column_names}
            self._todo = np.flatnonzero(work.redo.again(before)[self._reader.accepted])
            self._types = {field.name: field.type for field in before.schema if not pa.types.is_null(field.type)}
        for stage in work.stages:
            self._types |= {name: _type(kind) for name, kind in getattr(stage, "types", {}).items()}
        self._optional = [name for stage in work.stages for name in getattr(stage, "optional", ())]
        self._reads = dict.fromkeys(r for stage in work.stages for r in stage.reads if r not in self._written)
        self._size, self._ahead = work.batch_size, 2 * work.batch_size
        self._whole = any(getattr(stage, "whole", False) for stage in work.stages)
        if "pixels" in self._reads and (most := self._reader.largest(self._todo, self._whole)):
            self._ahead = max(4, min(self._ahead, PICTURES_BYTES // most))
            self._size = max(1, min(self._size, self._ahead))

    @property
    def starts(self) -> list[int]:
        """The rows that batches begin with, but for the first."""
        return self._reader.accepted[self._todo[self._size :: self._size]].tolist()

    def tables(self, rows: Rows, due: Callable[[], bool]) -> Iterator[tuple[int, pa.Table]]:
        """Do some rows of the shard, and yield them in order: a table whenever `due`, and one at the end.

        With each comes the row that it begins with. What ends the shard leaves out the rows that are not done.
        """
        first, end = rows
        runner, calls, accepted = self._work.runner, self._work.calls, self._reader.accepted
        assert runner is not None, "setup comes first"
        places = accepted[self._todo]
        todo = self._todo[(places >= first) & (places < end)]
        begun, reached = time.perf_counter(), first
        try:
            for part, batch in self._batches(todo):
                results = runner(batch)
                ended: UnavailableError | None = None
                for place, row in enumerate(accepted[part].tolist()):
                    if isinstance(results["state"][place], UnavailableError):
                        ended = results["state"][place]
                        if first < row:
                            yield first, self._table(first, row)
                        first = row + 1
                        continue
                    self._states[row], self._reasons[row] = results["state"][place], results["reason"][place]
                    for column in self._written:
                        self._columns[column][row] = results[column][place]
                if calls:
                    calls.took(len(part), time.perf_counter() - begun)
                reached = int(accepted[part[-1]]) + 1
                if ended:
                    raise ended
                if part[-1] != todo[-1] and due():
                    yield first, self._table(first, reached)
                    first = reached
                begun = time.perf_counter()
        except Exception as error:
            if first < reached and kind_of(error) != DEVICE:
                yield first, self._table(first, reached)  # what was done is not lost
            raise
        yield first, self._table(first, end)

    def written_off(self, rows: Rows, reason: str) -> pa.Table:
        """Some rows of the shard without doing them: failed, as far as there was something to do."""
        accepted = self._reader.accepted[self._todo]
        for row in accepted[(accepted >= rows[0]) & (accepted < rows[1])]:
            self._states[row], self._reasons[row] = FAILED, reason
        return self._table(*rows)

    def _table(self, first: int, end: int) -> pa.Table:
        columns = {"sample_id": self.sample_ids, "state": self._states, "reason": self._reasons} | self._columns
        types = self._types | {"reason": pa.string()}
        made = {name: wide.array(values[first:end], types.get(name)) for name, values in columns.items()}
        fields = [
            pa.field(name, made[name].type, metadata=OPTIONAL if name in self._optional else None)
            for name in made
            if name not in self._optional or made[name].null_count < end - first
        ]
        table = pa.table([made[field.name] for field in fields], pa.schema(fields))
        counted, summed = (
            [name for stage in self._work.stages for name in getattr(stage, kind, ())] for kind in ("counted", "summed")
        )
        return counting(table, counted, summed)

    def _batches(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, Columns]]:
        """Runs of `indices`, with the columns that the stages read of them."""
        stages, reader, calls = self._work.stages, self._reader, self._work.calls
        views: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        for stage in stages:
            views |= getattr(stage, "views", {})
        if "pixels" in self._reads:
            views["pixels"] = np.asarray  # as they are
        threads = max(4, 2 * int(max(stage.cpus for stage in stages)))
        looks = {"depth": self._ahead, "threads": threads, "whole": self._whole}
        pictures = reader.views(indices, views, **looks) if views else None
        images = reader.images(indices) if "image" in self._reads else None
        stored = [name for name in self._reads if name not in VIRTUAL and name not in views]
        start = 0
        while start < len(indices):
            part = indices[start : start + (min(self._size, calls.rows) if calls else self._size)]
            start += len(part)
            with clocked("wait"):
                batch = reader.stored(stored, part) | {"state": [ACCEPTED] * len(part), "reason": [None] * len(part)}
                if images is not None:
                    batch["image"] = list(islice(images, len(part)))
                    _fail_lost(batch, batch["image"])
                if pictures is not None:
                    seen = list(islice(pictures, len(part)))
                    _fail_lost(batch, seen)
                    batch |= {name: [_of(view, name) for view in seen] for name in views}
            yield part, batch


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Lists of numbers as arrays, of which a shard may have gigabytes, unless one has a number that is null."""
    whole = column.combine_chunks()
    plain = is_numbers(column.type) and not whole.values.null_count
    return as_list(whole, np.arange(len(column))) if plain else column.to_pylist()


def _type(name: str) -> pa.DataType:
    return pa.list_(pa.type_for_alias(name[:-2])) if name.endswith("[]") else pa.type_for_alias(name)


def _of(view: Mapping[str, np.ndarray] | Exception, name: str) -> Any:
    return view if isinstance(view, Exception) else view[name]


def _fail_lost(batch: Columns, values: list[Any]) -> None:
    for row, value in enumerate(values):
        if isinstance(value, Exception):
            batch["state"][row], batch["reason"][row] = FAILED, describe_error("image", value)
