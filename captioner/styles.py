"""A style of caption is data: its prompt, its length, its decoding; a recipe adds a third by naming it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Style:
    """How captions of one kind are asked for; `caption_<name>` is the column that they go to."""

    name: str
    prompt: str = ""  # words put before the caption, in training and in decoding alike; not a part of the caption
    decoder: str = ""  # which of the captioner's decoders speaks; its own, or the base's where it has none
    min_tokens: int = 1
    max_tokens: int = 60
    beams: int = 1  # 1 is greedy

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(
                f"A style's name becomes a column's name, so it must be a plain word; found '{self.name}'."
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise ValueError(
                f"Style '{self.name}' asks for {self.min_tokens} to {self.max_tokens} tokens; "
                "the bounds must be ordered and the upper one at least 1."
            )
        if self.beams < 1:
            raise ValueError(f"Style '{self.name}' asks for {self.beams} beams; 1 is greedy decoding.")


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the words of a caption are searched for: greedily, by beams, and with what is not said again.

    It draws nothing: the same features give the same caption.
    """

    beams: int = 1  # 1 is greedy
    no_repeat_ngram: int = 0  # no run of so many tokens is said twice; 0 bars none
    repetition_penalty: float = 1.0  # what makes tokens that were said less likely (arXiv 1909.05858, section 4.1)

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"A search needs at least 1 beam, which is greedy decoding; found {self.beams}.")
        if self.no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram is a number of tokens, or 0 for none; found {self.no_repeat_ngram}.")
        if self.repetition_penalty < 1:
            raise ValueError(
                f"A repetition_penalty under 1 rewards repetition; give 1 for none or more, not "
                f"{self.repetition_penalty}."
            )


# How faulty captions are decoded again, one after the other while the fault lasts. The first leaves lists alone, which
# say the same three words often and rightly.
RETRIES = (
    Search(beams=3, no_repeat_ngram=5),
    Search(beams=3, no_repeat_ngram=3, repetition_penalty=1.3),
)

SHORT = Style(name="short", max_tokens=30)
DESCRIPTIVE = Style(name="descriptive", max_tokens=60)
