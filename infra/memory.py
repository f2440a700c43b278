"""The memory that a run takes."""

import threading

import psutil


class MemoryWatch:
    """The peak memory of this process and all that it started, shared pages counted once (Linux)."""

    def __init__(self, every_seconds: float = 1.0) -> None:
        self.peak_gb = 0.0
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_gb = max(self.peak_gb, _memory_gb())
            if self._stop.wait(self._every):
                return


def _memory_gb() -> float:
    """Memory of this process and its descendants now, in GB (10^9 bytes).

    Private pages are summed; of shared ones (libraries, Ray's object store) the process that maps most stands for all.
    The kernel's own account (PSS) agrees within 2 %, but reading it stops each process for milliseconds.
    """
    try:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    except psutil.Error:
        return 0.0
    resident = [_resident(process.pid) for process in family]
    private = sum(one.get("RssAnon", 0) for one in resident)
    shared = sum(max(one.get(kind, 0) for one in resident) for kind in ("RssFile", "RssShmem"))
    return (private + shared) * 1024 / 1e9


def _resident(pid: int) -> dict[str, int]:
    """Resident kilobytes of a process by kind; nothing where it has gone, or the system does not say."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            pairs = (line.split(":", 1) for line in lines if line.startswith("Rss"))
            return {name: int(value.split()[0]) for name, value in pairs}
    except OSError:
        return {}
