"""One shard through stages: its images are fetched, decoded and made ready in threads, ahead of the models."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from infra.data.clock import clocked
from infra.data.ledger import counting
from infra.data.revision import Redo
from infra.data.shards import VIRTUAL, ShardReader
from infra.data.stage import ACCEPTED, FAILED, Columns, Runner, Stage, describe_error

PICTURES_BYTES = 512 * 2**20  # of whole pictures that wait decoded; photographs of 12 megapixels take 36 MB each


@dataclass
class StageWork:
    """Takes the accepted rows of a shard through stages in batches, their images decoded ahead.

    With `redo` it takes those rows alone that failed in an earlier revision, and keeps the others as they are there.
    """

    stages: tuple[Stage, ...]
    inputs: tuple[str, ...]
    batch_size: int
    redo: Redo | None = None
    _runner: Runner | None = field(default=None, init=False, repr=False)

    def setup(self) -> None:
        """Set the stages up."""
        for stage in self.stages:
            stage.setup()
        self._runner = Runner(self.stages)  # it learns which batches fit into memory

    def __call__(self, name: str) -> pa.Table:
        """All rows of the shard: those that were not accepted keep their state and reason."""
        assert self._runner is not None, "setup comes first"
        reader = ShardReader(self.inputs, name)
        written = [name for stage in self.stages for name in stage.writes]
        states, reasons = list(reader.states), list(reader.reasons)
        columns: Columns = {name: [None] * len(states) for name in written}
        indices = np.arange(len(reader))
        before = self.redo.table(name, reader.sample_ids) if self.redo else None
        if self.redo and before:
            states, reasons = before["state"].to_pylist(), before["reason"].to_pylist()
            columns = {column: before[column].to_pylist() for column in written}
            indices = np.flatnonzero(self.redo.again(before)[reader.accepted])
        for part, batch in self._batches(reader, indices, written):
            results = self._runner(batch)
            for place, row in enumerate(reader.accepted[part]):
                states[row], reasons[row] = results["state"][place], results["reason"][place]
                for column in written:
                    columns[column][row] = results[column][place]
        table = {"sample_id": reader.sample_ids, "state": states, "reason": pa.array(reasons, pa.string())}
        types = (
            {field.name: field.type for field in before.schema if not pa.types.is_null(field.type)} if before else {}
        )
        for stage in self.stages:
            types |= {name: pa.type_for_alias(kind) for name, kind in getattr(stage, "types", {}).items()}
        table |= {name: pa.array(values, types.get(name)) for name, values in columns.items()}
        return counting(pa.table(table), [name for stage in self.stages for name in getattr(stage, "counted", ())])

    def _batches(
        self, reader: ShardReader, indices: np.ndarray, written: list[str]
    ) -> Iterator[tuple[np.ndarray, Columns]]:
        """Parts of `indices`, with the columns that the stages read of them."""
        reads = dict.fromkeys(name for stage in self.stages for name in stage.reads if name not in written)
        views: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        for stage in self.stages:
            views |= getattr(stage, "views", {})
        if "pixels" in reads:
            views["pixels"] = np.asarray  # as they are
        size, ahead = self.batch_size, 2 * self.batch_size
        if "pixels" in reads and (most := reader.largest(indices)):
            ahead = max(4, min(ahead, PICTURES_BYTES // most))
            size = max(1, min(size, ahead))
        threads = max(4, 2 * int(max(stage.cpus for stage in self.stages)))
        pictures = reader.views(indices, views, depth=ahead, threads=threads) if views else None
        images = reader.images(indices) if "image" in reads else None
        stored = [name for name in reads if name not in VIRTUAL and name not in views]
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
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


def _of(view: Mapping[str, np.ndarray] | Exception, name: str) -> Any:
    return view if isinstance(view, Exception) else view[name]


def _fail_lost(batch: Columns, values: list[Any]) -> None:
    for row, value in enumerate(values):
        if isinstance(value, Exception):
            batch["state"][row], batch["reason"][row] = FAILED, describe_error("image", value)
