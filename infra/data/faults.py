"""Items over which devices failed, which are cut smaller until the rows at fault are found; known to a resume, too."""

from collections import Counter
from collections.abc import Collection, Iterator

from infra import storage
from infra.data.attempts import MAX_ATTEMPTS
from infra.data.health import Place
from infra.data.parts import Rows, read_item

FILE = "faults.json"  # in a folder that is being made: how many processes ended so, by item
CUT_IN = 16  # pieces, of which each costs a process at most


class Faults:
    """The processes that ended by an error of their device, by the item that they were at."""

    def __init__(self, out: str) -> None:
        self._url = storage.join(out, FILE)
        try:
            self._times: Counter[str] = Counter(storage.read_json(self._url))
        except FileNotFoundError:
            self._times = Counter()
        self.here: Counter[str] = Counter()  # of these, those of this run
        self._last: dict[str, tuple[Place, str]] = {}

    def add(self, item: str, place: Place, why: str) -> None:
        """A process ended so."""
        self._times[item] += 1
        self.here[item] += 1
        self._last[item] = place, why
        storage.write_json(self._url, self._times)

    def times(self, name: str) -> int:
        """How many processes ended over a shard or some of its rows."""
        return sum(times for item, times in self._times.items() if read_item(item)[0] == name)

    def cuts(self, name: str, rows: int) -> list[int]:
        """The rows, ascending, at which a shard of so many is to be cut: each run of rows that failed is, in pieces."""
        failed = [read_item(item)[1] or (0, rows) for item in self._times if read_item(item)[0] == name]
        return sorted({row for first, end in failed for row in range(first, end, -(-(end - first) // CUT_IN))})

    def found(self, well: Collection[Place], begun: bool) -> Iterator[tuple[str, Rows, str]]:
        """The shard, the rows and the reason, once, of each row that was all that a process was at when it ended so.

        Where the place has done something `well`; elsewhere its device may be to blame, and the row is tried three
        times, and found if other rows were done before (`begun`), though none is left to tell by.
        """
        for item, (place, why) in list(self._last.items()):
            name, rows = read_item(item)
            proven = place in well or (begun and self.here[item] >= MAX_ATTEMPTS)
            if rows and rows[1] - rows[0] == 1 and proven:
                del self._last[item]
                yield name, rows, why

    def close(self) -> None:
        """Forget all: every row is in a state."""
        if self._times:
            storage.remove(self._url)
