"""Where a corpus's captions are faulty: shares of faults, of those decoded again, and rates by shard."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from captioner.detect import FAULTS

WORST = 20  # shards that are named
STRIP = 120  # stretches that all shards are drawn as, in their order
RATES = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # upper ends of the histogram's bins; the first is none


@dataclass(frozen=True)
class _Shard:
    name: str
    rows: int
    faulty: int
    fault: str | None  # the most frequent

    @property
    def share(self) -> float:
        return self.faulty / self.rows


class Faults:
    """What `detect` found of one style, counted shard by shard; it holds a few numbers of each shard, and no row."""

    def __init__(self) -> None:
        self.flags: Counter[str | None] = Counter()
        self.tried, self.again, self.mended = 0, 0, 0
        self.shards: list[_Shard] = []

    def add(self, shard: str, flags: Sequence[Any], tries: Sequence[int | None] | None = None) -> None:
        """Count a shard's accepted rows: what is wrong with each caption (None: nothing), and how often it was decoded.

        Flags of other makers may be of another type than text: whatever is true counts, by its own words.
        """
        found = [_named(flag) for flag in flags]
        counts = Counter(found)
        self.flags.update(counts)
        for flag, count in zip(found, tries or (), strict=bool(tries)):
            self.tried += count is not None
            self.again += (count or 0) > 1
            self.mended += (count or 0) > 1 and flag is None
        if found:
            faulty = Counter({flag: count for flag, count in counts.items() if flag is not None})
            most = min(faulty, key=lambda flag: (-faulty[flag], flag), default=None)
            self.shards.append(_Shard(shard, len(found), faulty.total(), most))

    def report(self) -> dict[str, Any]:
        """The counts as plain data; shares are of all captions, 0 where there is none, None where nothing was said.

        `faults` is by fault, the worst first. `mended` captions are those decoded again that came out without a fault.
        `worst` names the shards of the highest rates, `strip` has the rates of stretches of shards in their order, and
        `histogram` counts shards by rate, the bins by their upper ends.
        """
        total = self.flags.total()
        named = [*FAULTS, *sorted({flag for flag in self.flags if flag is not None} - set(FAULTS))]
        worst = sorted(
            (shard for shard in self.shards if shard.faulty), key=lambda shard: (-shard.share, -shard.rows, shard.name)
        )
        return {
            "count": total,
            "faulty": _ratio(total - self.flags[None], total),
            "faults": {flag: self.flags[flag] / total for flag in named if self.flags[flag]},
            "decoded_again": self.again / self.tried if self.tried else None,
            "mended": self.mended / self.tried if self.tried else None,
            "shards": len(self.shards),
            "worst": [
                {"shard": one.name, "rows": one.rows, "share": one.share, "fault": one.fault} for one in worst[:WORST]
            ],
            "strip": self._strip(),
            "histogram": self._histogram(),
        }

    def _strip(self) -> list[float]:
        """At most `STRIP` rates: of each shard, or of as many neighbours together as have to be."""
        count = len(self.shards)
        ends = [round(count * place / min(count, STRIP)) for place in range(min(count, STRIP) + 1)] if count else []
        parts = [self.shards[start:end] for start, end in pairwise(ends)]
        return [sum(one.faulty for one in part) / sum(one.rows for one in part) for part in parts]

    def _histogram(self) -> list[list[float]]:
        """[upper end, shards] of each bin."""
        counts = dict.fromkeys(RATES, 0)
        for shard in self.shards:
            counts[next(end for end in RATES if shard.share <= end)] += 1
        return [[end, count] for end, count in counts.items()]


def _named(flag: Any) -> str | None:
    if isinstance(flag, str):
        return flag or None
    return "flagged" if flag is not None and flag == flag and bool(flag) else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
