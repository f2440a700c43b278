"""Where the seconds of a process go: parts of the work are clocked where they are done, and summed."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS: defaultdict[str, float] = defaultdict(float)
_LOCK = threading.Lock()


@contextmanager
def clocked(part: str) -> Iterator[None]:
    """Add the seconds spent in here to a part's; parts that run in threads beside the work add up beside it, too."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent = time.perf_counter() - began
        with _LOCK:
            _SECONDS[part] += spent


def taken() -> dict[str, float]:
    """The seconds of each part since this was called last."""
    with _LOCK:
        seconds = dict(_SECONDS)
        _SECONDS.clear()
    return seconds
