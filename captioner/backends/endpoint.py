"""Captions by a model that others serve, through OpenAI's chat API over HTTP."""

import os
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from captioner.backends.http import Budget, Client, Limiter
from captioner.backends.prompts import check_styles, prompt_of
from captioner.backends.protocol import Answer, CaptionError, Outcome
from captioner.backends.requests import Encoding, data_uri, messages
from captioner.styles import Style


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A served model. The key is read where it is used, from the environment variable `key_variable`, and kept nowhere.

    That variable has to be set on every machine that captions. Captions are asked for at temperature 0 with `seed`;
    whether that makes them repeatable is the server's affair.
    """

    base_url: str  # such as http://localhost:8000/v1
    model: str
    key_variable: str = ""  # none: no key is sent
    seed: int = 0
    max_side: int = 1024  # pixels; larger images are shrunk
    encoding: Encoding = "jpeg"
    concurrency: int = 16  # requests of one actor under way at once
    requests_per_minute: float | None = None  # of all actors together
    timeout: float = 60.0  # seconds for one try
    patience: float = 300.0  # seconds for all tries of one caption
    tries: int = 6

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be like http://host:8000/v1, but it is '{self.base_url}'.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"base_url of {parts.hostname} holds more than an address; put a key into an environment variable and "
                "its name into key_variable."
            )
        if not self.model:
            raise ValueError(f"Name the model that {self.base_url} is to caption with: --model NAME.")
        if self.key_variable and not self.key_variable.isidentifier():
            raise ValueError(
                "key_variable is the name of an environment variable, not a key; what it holds is no name."
            )
        for name in ("max_side", "concurrency", "timeout", "patience", "tries"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but it is {getattr(self, name)}.")
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            raise ValueError(f"requests_per_minute must be positive or left out, but it is {self.requests_per_minute}.")

    def check(self, styles: Sequence[Style]) -> None:
        """ValueError where a style has no prompt, or asks for a decoder, beams or a least length."""
        check_styles(styles, f"the model at {self.base_url}", cannot=("beams", "min_tokens"), needs_prompt=True)

    def build(
        self, styles: Sequence[Style], device: str, precision: str, actors: int, budget: Budget | None = None
    ) -> "Endpoint":
        """The backend. ValueError if there is no key or it is not taken, ConnectionError if nobody answers.

        `budget` is that of all actors together; None is without end.
        """
        self.greet()  # a server that is not there, or takes no such key, must not fail every row of a corpus
        limiter = Limiter(self.requests_per_minute / actors if self.requests_per_minute else None)
        client = self._client(limiter, budget or Budget())
        return Endpoint(self, styles, client)

    def greet(self) -> list[str]:
        """Ask whether somebody is there; the models that the server lists, none where it has no such list.

        ConnectionError if nobody answers, ValueError without a key that is taken.
        """
        url, client = self.base_url.rstrip("/"), self._client(Limiter(None), Budget())
        try:
            status, said = client.get(f"{url}/models")  # whatever else it says: not every server has this list
        except OSError as error:
            reason = getattr(error, "reason", error)  # urllib wraps what went wrong before the answer
            raise ConnectionError(f"Nobody answers at {url}: {getattr(reason, 'strerror', None) or reason}.") from None
        if status == 401:
            held = f"the key in {self.key_variable}" if self.key_variable else "requests without a key"
            raise ValueError(f"{url} does not take {held}: HTTP 401.")
        listed = said.get("data") if isinstance(said, dict) else None
        ids = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        return [each for each in ids if isinstance(each, str)]

    def _client(self, limiter: Limiter, budget: Budget) -> Client:
        return Client(
            url=f"{self.base_url.rstrip('/')}/chat/completions",
            secret=self._secret(),
            timeout=self.timeout,
            patience=self.patience,
            tries=self.tries,
            limiter=limiter,
            budget=budget,
        )

    def _secret(self) -> str:
        if not self.key_variable:
            return ""
        secret = os.environ.get(self.key_variable, "").strip()
        if not secret:
            raise ValueError(
                f"The environment variable {self.key_variable} holds no key here; set it on every machine."
            )
        if not (secret.isascii() and secret.isprintable()):
            raise ValueError(f"The key in {self.key_variable} has characters that cannot be sent; copy it anew.")
        return secret


class Endpoint:
    """Asks for many captions at once, each in a thread that waits."""

    def __init__(self, config: EndpointConfig, styles: Sequence[Style], client: Client) -> None:
        self._config, self._styles, self._client = config, styles, client

    def caption(self, images: Sequence[np.ndarray], alts: Sequence[str | None]) -> list[list[Outcome]]:
        """One request a caption; what went wrong with one is no matter to the others."""
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            uris = list(pool.map(self._encoded, images))
            # A picture's captions one after another, so that few pictures are half done where the server ends it.
            asked = [
                pool.submit(self._asked, style, uri, alt)
                for uri, alt in zip(uris, alts, strict=True)
                for style in self._styles
            ]
            said = [each.result() for each in asked]
        return [said[number :: len(self._styles)] for number in range(len(self._styles))]

    def _encoded(self, image: np.ndarray) -> str | CaptionError:
        try:
            return data_uri(image, self._config.max_side, self._config.encoding)
        except Exception as error:  # Pillow raises all sorts
            return CaptionError("decode_error", f"{type(error).__name__}: {error}")

    def _asked(self, style: Style, uri: str | CaptionError, alt: str | None) -> Outcome:
        if isinstance(uri, CaptionError):
            return uri
        body = {
            "model": self._config.model,
            "messages": messages(prompt_of(style, alt), uri),
            "max_tokens": style.max_tokens,
            "temperature": 0,
            "seed": self._config.seed,
        }
        try:
            answer = self._client.post(body)
            spent = tokens_of(answer)
            self._client.budget.told(sum(spent))
            said = Answer(caption_of(answer))
            said.prompt_tokens, said.answer_tokens = spent
            return said
        except CaptionError as failure:
            return failure


def tokens_of(answer: Any) -> tuple[int, int]:
    """The tokens that were read and written for a chat completion; 0 where the server does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    read, written = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return read, written


def caption_of(answer: Any) -> str:
    """The text of a chat completion; CaptionError where the model refused or the answer has none."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise CaptionError("error", f"the answer has no caption: {str(answer)[:200]}") from None
    if refusal or choice.get("finish_reason") == "content_filter":
        raise CaptionError("refused", str(refusal or "the server's filter kept the caption back"))
    if isinstance(content, list):  # some servers answer in parts
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not content.strip():
        raise CaptionError("error", f"the caption is empty (finish_reason: {choice.get('finish_reason')})")
    return content.strip()
