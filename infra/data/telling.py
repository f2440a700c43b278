"""What the driver tells of work that goes on elsewhere: in rows where it knows how many there are, else in shards."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from infra import storage
from infra.data.ledger import STATES, Record
from infra.data.parts import Part, all_parts, cover
from infra.metrics import Report

LOOK_SECONDS = 2.0  # until parts are listed again; on S3 ten times as many


class Telling:
    """Tells how far a step is: shards as they end, and in its body, now and then, the rows that lie in parts.

    `counts` are the rows of each shard, where they are known; `parts` those that others left of what is `left` to do.
    """

    def __init__(
        self,
        names: Sequence[str],
        left: Sequence[str],
        parts: Mapping[str, list[Part]],
        counts: Mapping[str, int],
        out: str,
        report: Report | None,
        why: Callable[[], str],
    ) -> None:
        self._names, self._left, self._out, self._report, self._why = names, {*left}, out, report, why
        self._rows = sum(counts.get(name, 0) for name in names)  # 0: not known
        self._before = sum(counts.get(name, 0) for name in names if name not in self._left)
        self._ended: Counter[str] = Counter()  # of the shards that ended here
        self._parts = self._within(parts)
        self._found, self._done = self._parts.copy(), 0
        self._new = dict.fromkeys(("rows_in", *STATES), 0)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="parts", daemon=True)

    def __enter__(self) -> "Telling":
        self._tell()
        if self._report and self._rows and self._left:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def ended(self, name: str, record: Record) -> None:
        """A shard was committed; to hear it twice does no harm."""
        with self._lock:
            if name not in self._left:
                return
            self._left.discard(name)
            self._ended.update({key: record[key] for key in ("rows_in", *STATES)})
            self._parts = self._within(self._listed)
        self._tell()

    def look(self) -> None:
        """See which parts have come."""
        found = all_parts(self._out)
        with self._lock:
            self._parts = self._within(found)
        self._tell()

    def so_far(self) -> str:
        """How much is done, in a sentence."""
        self.look()
        done, total, unit = self._reach()
        return f"{done:,} of {total:,} {unit} are done."

    def _reach(self) -> tuple[int, int, str]:
        if not self._rows:
            return len(self._names) - len(self._left), len(self._names), "shards"
        self._done = max(self._done, self._before + self._ended["rows_in"] + self._parts["rows_in"])
        return self._done, self._rows, "rows"

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS if storage.is_local(self._out) else 10 * LOOK_SECONDS):
            with suppress(OSError):  # the store is away: those who write there will say so
                self.look()

    def _within(self, parts: Mapping[str, list[Part]]) -> Counter[str]:
        """What lies in parts of shards that are not committed."""
        self._listed = parts
        sums: Counter[str] = Counter()
        for name in self._left & parts.keys():
            at = 0
            for part in cover(parts[name]):
                sums.update(
                    {"rows_in": part.end - max(at, part.first), **{state: getattr(part, state) for state in STATES}}
                )
                at = part.end
        return sums

    def _tell(self) -> None:
        if not self._report:
            return
        with self._lock:
            found = {key: self._ended[key] + self._parts[key] - self._found[key] for key in self._new}
            # The parts of a shard may be gone before it is known to have ended.
            if found["rows_in"] >= self._new["rows_in"]:
                self._new = found
            new = self._new.copy()
            self._report(*self._reach(), why=self._why, rows=new.pop("rows_in"), **new)
