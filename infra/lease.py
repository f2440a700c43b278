"""One driver a folder: a heartbeat file that a second driver respects and a dead driver does not keep."""

import json
import os
import socket
import threading
import time
import uuid

import psutil

from infra import storage

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
        while not self._take():
            holder = self._holder()
            if holder is not None and _is_alive(holder):
                raise RuntimeError(
                    f"Another driver (process {holder['pid']} on {holder['host']}) is working on {self._folder}. "
                    "Wait until it ends, or stop it; then give the same command again."
                )
            storage.remove(self._url)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        holder = self._holder()
        if holder is not None and holder["token"] == self._mine["token"]:
            storage.remove(self._url)

    def _take(self) -> bool:
        try:
            storage.write_bytes(self._url, self._record(), overwrite=False)
        except FileExistsError:
            return False
        holder = self._holder()
        return holder is not None and holder["token"] == self._mine["token"]

    def _holder(self) -> dict | None:
        try:
            return storage.read_json(self._url)
        except (FileNotFoundError, ValueError):
            return None

    def _record(self) -> bytes:
        return json.dumps({**self._mine, "beat": time.time()}).encode()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            storage.write_bytes(self._url, self._record())


def _is_alive(holder: dict) -> bool:
    if holder["host"] != socket.gethostname():
        return time.time() - holder["beat"] < STALE_SECONDS
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["born"]) < 1
    except psutil.Error:
        return False
