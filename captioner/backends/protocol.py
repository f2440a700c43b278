"""What every captioner that is not of our own making offers: pictures and styles in, texts or what went wrong out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from captioner.styles import Style


class CaptionError(Exception):
    """Why there is no caption. `kind` is one word, which failed rows are counted by.

    The kinds: `decode_error` (the picture), `timeout`, `rate_limit`, `refused` (the model will not speak of it),
    `http_<status>`, `oom`, `budget` (it was not asked), and `error` for all else.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = " ".join(message.split())[:400]

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Answer(str):
    """A caption of a served model, with the tokens that it read and wrote for it, as the server counts; 0: not told."""

    prompt_tokens: int = 0
    answer_tokens: int = 0


Outcome = str | CaptionError


class Backend(Protocol):
    """A captioner that is ready to speak in its styles; a config's `build` makes it in the process that uses it."""

    def caption(self, images: Sequence[np.ndarray], alts: Sequence[str | None]) -> list[list[Outcome]]:
        """For each style, the caption of each image (H, W, 3) uint8, or why it has none; nothing is raised for a row.

        `alts` are the texts that came with the images, for the styles whose prompts ask for them.
        """
        ...


class Config(Protocol):
    """What chooses a backend in a recipe: a frozen dataclass, cheap to make and to send."""

    def check(self, styles: Sequence[Style]) -> None:
        """ValueError where the styles ask for what this backend cannot do; nothing is loaded for it."""
        ...

    def build(self, styles: Sequence[Style], device: str, precision: str, actors: int) -> Backend:
        """The backend, loaded to `device`; `actors` of them run at once and share what is limited.

        What no row could be captioned without is asked for here: what is raised stops the run, and fails no rows.
        """
        ...
