"""What a whole step takes, told from a piece of it: its start once, and its rate for all that is left."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

WARM = 0.25  # of a piece, that is not measured: memory and caches are filled


class Mark(NamedTuple):
    """How far a piece was, when, and what it had taken until then."""

    done: int
    total: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a step will take, by a piece of it."""

    step: str
    id: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    images_per_second: float = 0.0  # once it has begun
    fixed_cpu_seconds: float = 0.0  # to begin and to end
    peak_memory_gb: float = 0.0  # of all its processes
    worker_memory_gb: float = 0.0  # of the largest process
    gpu_memory_gb: float = 0.0  # of the fullest GPU; 0 where there is none
    cache_bytes: int = 0
    probe_cpu_seconds: float = 0.0  # that the piece took
    notes: tuple[str, ...] = ()
    failed: str = ""  # why it is not known

    def told(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"notes": list(self.notes)}


def segments(marks: Sequence[Mark]) -> Iterator[list[Mark]]:
    """The marks of each training of a step that trains several in turn: a count that falls begins anew."""
    found: list[Mark] = []
    for mark in marks:
        if found and (mark.done < found[-1].done or mark.total != found[-1].total):
            yield found
            found = []
        if not found or mark.done > found[-1].done:
            found.append(mark)
    if found:
        yield found


def rate(marks: Sequence[Mark], begin: float) -> tuple[float, float] | None:
    """Seconds and CPU-seconds of a unit, by least squares over the marks from `begin` units on; None of fewer than two.

    The last mark waits for what ends a piece, so it counts only where there are no two others.
    """
    late = [mark for mark in marks if mark.done >= begin]
    usable = [mark for mark in late if mark.done < mark.total]
    usable = usable if len(usable) > 2 else late
    if len({mark.done for mark in usable}) < 2:
        return None
    done = np.array([mark.done for mark in usable], np.float64)
    spread = done - done.mean()
    slopes = [
        float(spread @ np.array([getattr(mark, name) for mark in usable]) / (spread @ spread))
        for name in ("seconds", "cpu_seconds")
    ]
    return max(slopes[0], 0.0), max(slopes[1], 0.0)


def whole(taken: float, parts: Sequence[tuple[float, float]]) -> float:
    """What all takes, where a piece took so much: of each part, what it took of that, and how many times is left."""
    return max(0.0, taken + sum(of_part * (times - 1) for of_part, times in parts))


def lines(estimates: Sequence[Estimate], price: float) -> list[str]:
    """What a person reads: a table, the cost where an hour has a price, and what each figure rests on."""
    if not estimates:
        return ["All is done: nothing is left to be probed."]
    heads = ("step", "images/s", "memory GB", "worker GB", "caches", "CPU-s", "fixed", "hours")
    rows = [heads, *(_row(each) for each in estimates if not each.failed)]
    known = [each for each in estimates if not each.failed]
    total = Estimate(
        step="all",
        id="",
        seconds=sum(each.seconds for each in known),
        cpu_seconds=sum(each.cpu_seconds for each in known),
        fixed_cpu_seconds=sum(each.fixed_cpu_seconds for each in known),
        peak_memory_gb=max((each.peak_memory_gb for each in known), default=0.0),
        worker_memory_gb=max((each.worker_memory_gb for each in known), default=0.0),
        cache_bytes=sum(each.cache_bytes for each in known),
    )
    rows.append(_row(total))
    widths = [max(len(row[place]) for row in rows) for place in range(len(heads))]
    told = ["  ".join(_put(row, widths)) for row in rows]
    if price:
        told.append(f"cost: {price * total.seconds / 3600:,.2f}, at {price:g} an hour of this machine")
    told += [f"{each.step}: {'; '.join(each.notes)}." for each in known if each.notes]
    told += [f"{each.step}: not known. {each.failed}" for each in estimates if each.failed]
    return told


def _put(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    yield row[0].ljust(widths[0])
    for word, width in zip(row[1:], widths[1:], strict=True):
        yield word.rjust(width)


def _row(each: Estimate) -> tuple[str, ...]:
    images = f"{each.images_per_second:,.4g}" if each.images_per_second else ""
    memory = (f"{each.peak_memory_gb:.2f}", f"{each.gpu_memory_gb or each.worker_memory_gb:.2f}")
    spent = (f"{each.cpu_seconds:,.0f}", f"{each.fixed_cpu_seconds:,.0f}", f"{each.seconds / 3600:.3f}")
    return (each.step, images, *memory, size(each.cache_bytes), *spent)


def size(count: int) -> str:
    """Bytes in words."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, max(0, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {units[power]}"
