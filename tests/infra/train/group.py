"""Workers that are threads of this process: their collectives, and the worker that a thread is."""

import threading
from concurrent.futures import ThreadPoolExecutor

from infra.train import world


class Group:
    """`size` workers; `run(work)` calls work() as each of them and returns what each returned, or its exception."""

    def __init__(self, monkeypatch, size):
        self.size, self._here, self._values = size, threading.local(), [None] * size
        self._barrier = threading.Barrier(size, timeout=20)
        monkeypatch.setattr(world, "rank", lambda: getattr(self._here, "rank", 0))
        monkeypatch.setattr(world, "size", lambda: size if hasattr(self._here, "rank") else 1)
        monkeypatch.setattr(world, "gather", lambda value: self._gather(value))

    def _gather(self, value):
        if not hasattr(self._here, "rank"):
            return [value]
        self._values[self._here.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, work):
        def one(rank):
            self._here.rank = rank
            try:
                return work()
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))
