"""What the processes of a run take: CPU-seconds, and the memory of the largest of them."""

import os
import threading
import time
from contextlib import suppress

import psutil

_Key = tuple[int, float]  # a process: its number, and when it began, since numbers come again


class CpuWatch:
    """CPU-seconds of this process and all that it started, from here on.

    It looks every half second: what a process took after the last look before its end is missed. Processes on other
    machines are not seen. `largest_gb` is the most memory (RSS, in 10^9 bytes) that one process other than this had.
    """

    def __init__(self, every_seconds: float = 0.5) -> None:
        self._every = every_seconds
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spent", daemon=True)
        self._spent: dict[_Key, float] = {}
        self.largest_gb, self._began = 0.0, time.monotonic()
        self._before = self._look()

    def __enter__(self) -> "CpuWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds()

    def seconds(self) -> float:
        """What was taken until now."""
        return self._look() - self._before

    def lasted(self) -> float:
        """Seconds until now."""
        return time.monotonic() - self._began

    def _look(self) -> float:
        family = _family()
        with self._lock:  # of the processes that have gone, what they had taken at the last look stays
            self._spent |= {key: spent for key, (spent, _) in family.items()}
            held = [size for (pid, _), (_, size) in family.items() if pid != os.getpid()]
            self.largest_gb = max([self.largest_gb, *held])
            return sum(self._spent.values())

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self._look()


def _family() -> dict[_Key, tuple[float, float]]:
    """CPU-seconds, without those of processes that it waited for, and memory of this process and its descendants."""
    found: dict[_Key, tuple[float, float]] = {}
    own = psutil.Process()
    with suppress(psutil.Error):
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                key = process.pid, process.create_time()
                found[key] = times.user + times.system, process.memory_info().rss / 1e9
    return found
