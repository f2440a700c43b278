"""Say that Ray's own process on this machine died: Ray then ends the driver, some seconds later and without a word."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

LOOK_SECONDS = 0.5


def broke_off(error: Exception) -> RuntimeError:
    """What it means that Ray raised this where work tells its own errors: a node went, or Ray did."""
    told = " ".join(str(error).split())[:300]
    return RuntimeError(f"Ray broke off: {told} What was committed stays; give the same command again.")


@contextmanager
def watched() -> Iterator[None]:
    """Watch the raylet that this process started, if it did, while the body runs."""
    raylets = [each for each in psutil.Process().children(recursive=True) if _is(each, "raylet")]
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(raylets, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(raylets: list[psutil.Process], stop: threading.Event) -> None:
    while not stop.wait(LOOK_SECONDS):
        if not all(_is(each, "raylet") for each in raylets):
            print(
                "rescribe: Ray's raylet was killed, perhaps for want of memory, and this run ends with it. "
                "What was committed stays; give the same command again to continue.",
                file=sys.stderr,
                flush=True,
            )
            return


def _is(process: psutil.Process, name: str) -> bool:
    try:
        return process.name() == name and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
