"""One JSON answer from a server that is busy, slow or broken at times: a rate, tries, and an end to waiting."""

import contextlib
import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from captioner.backends.protocol import CaptionError

MAX_ANSWER = 2**23  # bytes; a caption has some hundreds
BACKOFF, MAX_BACKOFF = 0.5, 30.0  # seconds before the second try, doubled for each further one
_BUSY = {408, 425, 429}
_REFUSALS = ("content_filter", "content_policy", "content management policy")


class Limiter:
    """Takes turns among threads: evenly spaced, `per_minute` of them, and none while the server asks for quiet."""

    def __init__(self, per_minute: float | None) -> None:
        self._spacing = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def turn(self) -> float:
        """Take the next turn; return the seconds to wait until it comes."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._spacing
            return start - now

    def hold(self, seconds: float) -> None:
        """Give no turn for some seconds."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Budget:
    """How much may be asked of a server: requests, and tokens that are read and written; 0 of either has no end.

    Where several processes ask, it lies in one of them.
    """

    def __init__(self, requests: int = 0, tokens: int = 0) -> None:
        self._requests, self._tokens = requests, tokens
        self._asked = self._told = 0
        self._lock = threading.Lock()

    def ask(self) -> str:
        """Take one request; returns what is used up, as `8 requests`, where there is none to take."""
        with self._lock:
            for name, most, used in (("requests", self._requests, self._asked), ("tokens", self._tokens, self._told)):
                if most and used >= most:
                    return f"{most:,} {name}"
            self._asked += 1
            return ""

    def told(self, tokens: int) -> None:
        """So many tokens were read and written."""
        with self._lock:
            self._told += tokens


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key along to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _TransientError(Exception):
    """A failure that another try may mend, after as many seconds as the server says, if it does."""

    def __init__(self, failure: CaptionError, after: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure, self.after = failure, after


@dataclass(frozen=True, kw_only=True)
class Client:
    """Posts to one URL from many threads. `secret` is sent as a bearer token and struck from every message.

    A request is given up after `tries` tries, or when `patience` seconds have passed since its first turn came. No try
    takes more than about twice `timeout` seconds: as much for silence, and as much for an answer that drips.
    """

    url: str
    secret: str = field(default="", repr=False)
    timeout: float
    patience: float
    tries: int
    limiter: Limiter
    budget: Budget = field(default_factory=Budget)
    sleep: Callable[[float], None] = time.sleep

    def post(self, body: Mapping[str, Any]) -> Any:
        """The answer to `body`, from JSON to JSON. Raises CaptionError."""
        data = json.dumps(body, allow_nan=False).encode()
        self.sleep(self.limiter.turn())
        deadline = time.monotonic() + self.patience
        for number in range(self.tries):
            if used_up := self.budget.ask():
                raise CaptionError("budget", used_up)
            try:
                return self._send(data, min(self.timeout, max(deadline - time.monotonic(), 0.001)))
            except _TransientError as again:
                failure, wait = again.failure, again.after
            if wait is None:
                wait = min(BACKOFF * 2**number, MAX_BACKOFF) * random.uniform(0.5, 1)
            elif time.monotonic() + wait < deadline:
                self.limiter.hold(wait)  # the others would hear the same
                wait += random.uniform(0, 0.1)
            wait = max(wait, self.limiter.turn())
            if number + 1 == self.tries or time.monotonic() + wait >= deadline:
                break
            self.sleep(wait)
        raise CaptionError(failure.kind, f"{failure.message} (given up after {_times(number + 1)})")

    def get(self, url: str) -> tuple[int, Any]:
        """The status of the answer to a plain GET, and what it says, from JSON, None where it cannot be read.

        Raises OSError if there is no answer.
        """
        try:
            with self._open(url, None, self.timeout) as response:
                said = None
                with contextlib.suppress(ValueError, RecursionError, OSError, http.client.HTTPException):
                    said = json.loads(_read(response, self.timeout))
                return response.status, said
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, None

    def _open(self, url: str, data: bytes | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        return urllib.request.build_opener(_Stay).open(urllib.request.Request(url, data, headers), timeout=timeout)

    def _send(self, data: bytes, timeout: float) -> Any:
        try:
            with self._open(self.url, data, timeout) as response:
                return json.loads(_read(response, timeout))
        except urllib.error.HTTPError as error:
            with error:
                problem = self._judged(error)
        except (ValueError, RecursionError) as error:
            problem = _TransientError(CaptionError("error", f"the answer is not JSON: {self._shown(str(error))}"))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)  # urllib wraps what went wrong before the answer
            if isinstance(reason, TimeoutError):
                problem = _TransientError(CaptionError("timeout", f"no whole answer within {timeout:.3g} s"))
            else:
                problem = _TransientError(CaptionError("error", f"connection: {self._shown(repr(reason))}"))
        raise problem from None

    def _judged(self, error: urllib.error.HTTPError) -> Exception:
        try:
            text = error.read(4000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        said = self._shown(_message(text) or str(error.reason))
        if error.code in _BUSY or error.code >= 500:
            kind = "rate_limit" if error.code == 429 else f"http_{error.code}"
            return _TransientError(CaptionError(kind, said), _retry_after(error.headers.get("Retry-After")))
        if error.code in (400, 403) and any(word in text.lower() for word in _REFUSALS):
            return CaptionError("refused", said)
        return CaptionError(f"http_{error.code}", said)

    def _shown(self, text: str) -> str:
        """Servers quote what they were sent."""
        return text.replace(self.secret, "***") if self.secret else text


def _read(response: http.client.HTTPResponse, timeout: float) -> bytes:
    """The whole body; TimeoutError if it drips, IncompleteRead if it is cut."""
    deadline = time.monotonic() + timeout
    body = bytearray()
    while piece := response.read1(2**16):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > MAX_ANSWER:
            raise ValueError(f"it has more than {MAX_ANSWER} bytes")
    if response.length:  # what was announced and did not come: read1 takes the end for an end
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(body)


def _message(text: str) -> str:
    """What an error's body says, in the layouts of the servers that are about."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)


def _retry_after(header: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None if there is none that can be read."""
    if not header:
        return None
    try:
        return max(0.0, float(header)) if header.strip().replace(".", "", 1).isdigit() else _until(header)
    except (TypeError, ValueError):
        return None


def _until(date: str) -> float:
    moment = email.utils.parsedate_to_datetime(date)
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _times(number: int) -> str:
    return "1 try" if number == 1 else f"{number} tries"
