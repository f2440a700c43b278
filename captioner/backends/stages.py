"""Captioning by any backend as one stage: pictures and alt texts in, a caption in each style out."""

from dataclasses import dataclass, field
from typing import Any, Literal

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.http import Budget
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.protocol import Backend, CaptionError, Outcome
from captioner.provenance import Sign
from captioner.styles import Style
from captioner.task import ALT_COLUMN
from infra.data.stage import FAILED
from infra.trouble import HaltError, UnavailableError

# The kinds of failure that are no fault of their rows, and would be those of all others: what is told of one.
STOPS = {
    "http_401": (
        UnavailableError,
        "The server takes the key no longer: {said}. Give the line again with one it takes.",
    ),
    "budget": (HaltError, "The budget of {said.message} is used up. Give the line again, and it goes on."),
}
TOKENS = ("prompt_tokens", "answer_tokens")  # columns of a served model


@dataclass
class CaptionWith:
    """Speaks of each picture in every style. Writes `caption_<style>`; there are no log-probabilities.

    `sign` writes beside each caption where it comes from, for rows too that fail in another style.

    A row with a style that failed is failed: its reason begins with the error's kind (see `CaptionError`) and names
    the style; what the other styles said of it stands in their columns. A refused key, or a budget that is used up,
    fails no row: the state of what was not answered is an UnavailableError. For a served model it writes
    `prompt_tokens` and `answer_tokens`, what was read and written for all captions of a row, and `budget` is that of
    all actors together.
    """

    backend: TransformersConfig | EndpointConfig
    styles: tuple[Style, ...]
    precision: Literal["fp32", "bf16"] = "fp32"
    cpus: float = 1
    gpus: float = 0
    actors: int = 1  # that run at once, and share a rate limit
    sign: Sign = field(default_factory=lambda: Sign({}))
    whole: bool = False  # it sees pictures as the corpus has them
    budget: Budget | None = None
    reads: tuple[str, ...] = field(default=("pixels", ALT_COLUMN), init=False)
    writes: tuple[str, ...] = field(init=False)
    types: dict[str, str] = field(init=False)
    summed: tuple[str, ...] = field(init=False)
    _captioner: Backend | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.backend.check(self.styles)
        self._captions = tuple(f"caption_{style.name}" for style in self.styles)
        self.summed = TOKENS if isinstance(self.backend, EndpointConfig) else ()
        self.types = dict.fromkeys(self._captions, "string") | self.sign.types | dict.fromkeys(self.summed, "int64")
        self.writes = tuple(self.types)
        if isinstance(self.backend, EndpointConfig):
            # Rows are asked for one by one, an answer may take a minute, and fewer at once are answered no sooner.
            self.few = -(-self.backend.concurrency // len(self.styles))

    def setup(self) -> None:
        """Load the backend."""
        device = "cuda" if self.gpus else "cpu"
        self.sign.setup()
        limits: dict[str, Any] = {"budget": self.budget} if isinstance(self.backend, EndpointConfig) else {}
        self._captioner = self.backend.build(self.styles, device, self.precision, self.actors, **limits)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Captions in all styles, and the state of the rows."""
        assert self._captioner is not None, "setup comes first"
        said = self._captioner.caption(batch["pixels"], batch[ALT_COLUMN])
        by_row = list(zip(*said, strict=True))
        columns: dict[str, list] = {
            column: [None if isinstance(outcome, CaptionError) else _storable(outcome) for outcome in outcomes]
            for column, outcomes in zip(self._captions, said, strict=True)
        }
        reasons = [self._reason(outcomes) for outcomes in by_row]
        columns |= self.sign(columns)
        for name in self.summed:
            columns[name] = [sum(getattr(outcome, name, 0) for outcome in outcomes) for outcomes in by_row]
        states = [
            self._stopped(outcomes) or (FAILED if reason else None)
            for outcomes, reason in zip(by_row, reasons, strict=True)
        ]
        return columns | {"state": states, "reason": reasons}

    def _stopped(self, outcomes: tuple[Outcome, ...]) -> UnavailableError | None:
        """Why one row was not answered, where that is no fault of its own."""
        failures = (outcome for outcome in outcomes if isinstance(outcome, CaptionError))
        if (said := next((failure for failure in failures if failure.kind in STOPS), None)) is None:
            return None
        error, sentence = STOPS[said.kind]
        return error(sentence.format(said=said))

    def _reason(self, outcomes: tuple[Outcome, ...]) -> str | None:
        """The first failure of one row."""
        for style, outcome in zip(self.styles, outcomes, strict=True):
            if isinstance(outcome, CaptionError):
                return _storable(f"{outcome.kind}: {style.name}: {outcome.message}")
        return None


def _storable(text: str) -> str:
    """Half characters, which JSON can carry and UTF-8 cannot, would lose the whole shard when it is written."""
    return text.encode("utf-8", "replace").decode()
