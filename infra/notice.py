"""What a run is told from outside, and what it says: signals, kept until work is saved, and lines on standard error."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_SECONDS = 30  # between two lines of a kind
ECHO_SECONDS = 1.0  # within which a signal is no second one: `timeout` tells a process, and then its group with it


class Notice:
    """SIGTERM or SIGINT, kept until what is trained is saved; a second one is not kept."""

    def __init__(self) -> None:
        self._signal, self._came = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def given(self) -> bool:
        return self._signal != 0

    def heed(self) -> None:
        """End as the signal asks, if there was one."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            raise SystemExit(128 + self._signal)

    def _note(self, number: int, _: Any) -> None:
        if self._signal and _is_echo(self._came):
            return
        if self._signal:
            self.heed()
        self._signal, self._came = number, time.monotonic()
        print("rescribe: Saving what is trained; once more ends at once.", file=sys.stderr, flush=True)


@contextmanager
def later() -> Iterator[None]:
    """A signal that comes while the body runs does after it what it would have done in it; a second one does not wait.

    For the few calls that must be done whole or not at all, in the thread that signals come to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not Python's
    came: list[tuple[int, float]] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        if came and _is_echo(came[0][1]):
            return
        came.append((number, time.monotonic()))
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
    if came:
        signal.raise_signal(came[0][0])


def _is_echo(came: float) -> bool:
    return time.monotonic() - came < ECHO_SECONDS


class Teller:
    """Lines on standard error; the same one only once in a while."""

    def __init__(self) -> None:
        self._last, self._when = "", 0.0

    def __call__(self, text: str) -> None:
        kind, now = text.split(":")[0], time.monotonic()
        if kind != self._last or now - self._when > AGAIN_SECONDS:
            print(f"rescribe: {text}", file=sys.stderr, flush=True)
            self._last, self._when = kind, now
