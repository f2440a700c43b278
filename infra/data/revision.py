"""A revision of an artifact: the rows that failed for a reason are done again, the rest is carried over untouched."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.data import wide
from infra.data.ledger import JOURNAL, LEDGER, Ledger, side_files
from infra.data.parts import PARTS
from infra.data.plain import check_plain
from infra.data.shards import shard_url
from infra.data.stage import FAILED

FILE = "revision.json"  # in a revision's folder, written when all that is kept has been carried over


def revise(old: str, new: str, only: Sequence[str], leave: Sequence[str]) -> list[str]:
    """Carry an artifact over to the folder `new`, all but the shards that have failed rows of the kinds in `only`.

    An empty `only` means every kind. `leave` are top-level names that stay behind. Returns the shards that are to be
    done again; ValueError where there are none.
    """
    if storage.exists(storage.join(new, FILE)):
        begun = storage.read_json(storage.join(new, FILE))
        if begun["only"] != list(only):
            wanted = ", ".join(begun["only"]) or "every kind"
            raise ValueError(f"{new} was begun for {wanted} and then cut. Finish it so first; then retry for others.")
        return begun["shards"]
    records = Ledger(old).complete()
    failed = [name for name, record in records.items() if record[FAILED]]
    shards = [name for name in failed if not only or _matching(_states(old, name), only).any()]
    if not shards:
        kinds = sorted({reason for name in failed for reason in records[name]["reasons"]})
        beside = (
            f" with {', '.join(only)}; reasons found beside failed rows: {', '.join(kinds) or 'none'}" if only else ""
        )
        raise ValueError(f"No row of {old} failed{beside}.")
    again = {shard_url(old, name) for name in shards}
    kept = side_files(record for name, record in records.items() if name not in shards)
    again |= {storage.join(old, wide.FOLDER, file) for file in side_files(records.values()) - kept}
    for file in storage.listing(old):
        relative = file.url.removeprefix(storage.absolute(old)).lstrip("/")
        top = relative.split("/")[0]
        if file.url not in again and top not in (LEDGER, JOURNAL, PARTS, FILE, *leave):
            storage.copy(file.url, storage.join(new, relative))
    storage.write_json(storage.join(new, FILE), {"of": old, "only": list(only), "shards": shards})
    return shards


@dataclass(frozen=True)
class Redo:
    """What of a shard is done again: the rows that failed in the artifact `of` for one of the reasons `only`."""

    of: str
    only: tuple[str, ...]

    @staticmethod
    def of_folder(out: str) -> "Redo | None":
        """What the folder of a revision says; None for any other folder."""
        url = storage.join(out, FILE)
        if not storage.exists(url):
            return None
        record = storage.read_json(url)
        return Redo(record["of"], tuple(record["only"]))

    def table(self, name: str, sample_ids: Sequence[str]) -> pa.Table:
        """A shard as it was; ValueError where its inputs hold other rows now."""
        with storage.open_read(shard_url(self.of, name)) as file:
            table = pq.read_table(file, use_threads=False)
        check_plain(table.schema, shard_url(self.of, name))
        if table["sample_id"].to_pylist() != list(sample_ids):
            raise ValueError(f"Shard {name} of {self.of} does not hold the rows that its inputs have now.")
        return wide.whole(self.of, table)

    def again(self, table: pa.Table) -> np.ndarray:
        """Which rows (booleans) are to be done again."""
        return _matching(table, self.only)


def _matching(table: pa.Table, only: Sequence[str]) -> np.ndarray:
    """Which rows failed for one of the reasons `only`, or for any where it is empty."""
    rows = zip(table["state"].to_pylist(), table["reason"].to_pylist(), strict=True)
    return np.array([s == FAILED and (not only or (r or "").split(":")[0] in only) for s, r in rows], dtype=bool)


def _states(artifact: str, name: str) -> pa.Table:
    with storage.open_read(shard_url(artifact, name)) as file:
        table = pq.read_table(file, columns=["state", "reason"], use_threads=False)
    check_plain(table.schema, shard_url(artifact, name))
    return table
