"""What the processes of a run take: CPU-seconds, and the memory of the largest of them."""

import os
import threading
import time
from contextlib import suppress

_TICKS, _PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
_Key = tuple[int, int]  # a process: its number, and when it began, since numbers come again


class CpuWatch:
    """CPU-seconds of this process and all that it started, from here on (Linux; elsewhere of this process alone).

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
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        times = os.times()
        return {(os.getpid(), 0): (times.user + times.system, 0.0)}
    known = {pid: fields for pid in pids if (fields := _fields(pid))}
    children: dict[int, list[int]] = {}
    for pid, fields in known.items():
        children.setdefault(int(fields[1]), []).append(pid)
    family, found = [os.getpid()], dict[_Key, tuple[float, float]]()
    for pid in family:
        family += children.get(pid, ())
        if fields := known.get(pid):
            spent = (int(fields[11]) + int(fields[12])) / _TICKS
            found[pid, int(fields[19])] = spent, int(fields[21]) * _PAGE / 1e9
    return found


def _fields(pid: int) -> list[str]:
    """What `/proc/<pid>/stat` says after the command's name (proc(5): from the third field on)."""
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
    return []
