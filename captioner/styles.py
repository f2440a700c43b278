"""A style of caption is data: its prompt, its length, its decoding; a recipe adds a third by naming it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioner.vocabulary import Vocabulary

ALT = "{alt}"  # in a prompt: the place of the text that came with the picture
ALT_TOKENS = (8, 64)  # of an alt text in a prompt: what there must be room for, and what is read at most
_PLACE = re.compile(r"\[[^\[\]]*\{alt\}[^\[\]]*\]|\{alt\}")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How captions of one kind are asked for; `caption_<name>` is the column that they go to."""

    name: str
    # Words put before the caption, in training and in decoding alike; not a part of it. `{alt}` is the row's alt text.
    prompt: str = ""
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

    @property
    def reads_alt(self) -> bool:
        """Whether a row's alt text is a part of its prompt."""
        return ALT in self.prompt


def fill(prompt: str, alt: str | None) -> str:
    """A prompt for one row: `{alt}` becomes its alt text, as it is.

    Square brackets around `{alt}` hold what is said of it, and go, with all that is in them, where a row has none:
    "Describe this picture.[ Its file says: {alt}]". Other brackets and braces mean nothing.
    """
    text = (alt or "").strip()

    def put(place: re.Match[str]) -> str:
        if place[0] == ALT:
            return text
        return place[0][1:-1].replace(ALT, text) if text else ""

    return _PLACE.sub(put, prompt)


def prompts_of(style: Style, alts: Sequence[str | None], vocabulary: "Vocabulary", max_length: int) -> list[str]:
    """The prompt of each row for a captioner of ours, whose sequences are `max_length` tokens long.

    An alt text is cut to the tokens that the style's longest caption leaves, and to 64; ValueError if fewer than 8 are
    left. Training and decoding both ask here, so that a decoder meets the prompts that it was trained on.
    """
    if not style.reads_alt:
        return [style.prompt] * len(alts)
    fewest, most = ALT_TOKENS
    own = len(vocabulary.encode([style.prompt.replace(ALT, "")])[0])
    room = (max_length - 1 - own - style.max_tokens) // style.prompt.count(ALT)
    if room < fewest:
        raise ValueError(
            f"Style '{style.name}' leaves {max(room, 0)} of {max_length} tokens for the alt text in its prompt, and "
            f"at least {fewest} are needed: lower its max_tokens ({style.max_tokens}), or train longer sequences."
        )
    return [fill(style.prompt, vocabulary.cut(alt or "", min(room, most))) for alt in alts]


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
