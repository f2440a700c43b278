"""One driver a folder: a heartbeat file that a second driver respects and a dead driver does not keep."""

import os
import socket
import threading
import time
import uuid

import psutil

from infra import storage, strict
from infra.notice import later

BEAT_SECONDS = 10
STALE_SECONDS = 60


class Lease:
    """Held while the body runs; raises RuntimeError where another living driver holds it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._url = storage.join(folder, "lease.json")
        self._mine = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": psutil.Process().create_time(),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Lease":
        try:
            with later():
                self._take(self._url)
                self._thread.start()
        except (KeyboardInterrupt, SystemExit):  # it is ours, and the body will not run
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with later():
            self._stop.set()
            if self._thread.is_alive():
                self._thread.join()
            try:
                if _token(self._url) == self._mine["token"]:
                    storage.remove(self._url)
            except OSError:
                pass  # a lease that is left is one of a dead driver; what went wrong is said by what went wrong before

    def _take(self, url: str) -> None:
        """Put our record at `url`, in place of a dead driver's if need be; RuntimeError if a living one's is there.

        Of several that find the same dead holder one may remove its record: who holds a lease on doing so.
        """
        while not self._put(url):
            holder = _read(url)
            if holder is None:
                continue  # it has just been given back
            if _is_alive(holder):
                raise RuntimeError(
                    f"Another driver (process {holder['pid']} on {holder['host']}) is working on {self._folder}. "
                    "Wait until it ends, or stop it; then give the same command again."
                )
            removal = storage.join(self._folder, f"lease-{holder['token']}.json")
            self._take(removal)
            if _token(url) == holder["token"]:
                storage.remove(url)
            storage.remove(removal)

    def _put(self, url: str) -> bool:
        try:
            storage.write_bytes(url, self._record(), overwrite=False)
        except FileExistsError:
            return False
        return _token(url) == self._mine["token"]  # a store may not know "only if absent"

    def _record(self) -> bytes:
        return strict.dumps({**self._mine, "beat": time.time()}).encode()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if _token(self._url) != self._mine["token"]:
                    return  # we were silent for so long that another took over: it is theirs now
                storage.write_bytes(self._url, self._record())
            except OSError:
                pass  # the store is away, or full: the next beat may come through


def _read(url: str) -> dict | None:
    try:
        return storage.read_json(url)
    except FileNotFoundError:
        return None
    except ValueError:  # nobody's
        return {"token": "torn", "host": "", "pid": 0, "beat": 0.0}


def _token(url: str) -> str | None:
    holder = _read(url)
    return holder["token"] if holder else None


def _is_alive(holder: dict) -> bool:
    if holder["host"] != socket.gethostname():
        return time.time() - holder["beat"] < STALE_SECONDS
    try:
        process = psutil.Process(holder["pid"])
        # A zombie is dead, though nobody has asked how it died: the driver of a container may have no one to ask.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["born"]) < 1
    except psutil.Error:
        return False
