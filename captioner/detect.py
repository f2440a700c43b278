"""What is wrong with a caption, judged by its text alone: loops, leaks, refusals, and lengths that cannot be."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from captioner.words import words

EMPTY, REPETITION, LEAK, REFUSAL = "empty", "repetition", "prompt leak", "refusal"
TOO_SHORT, TOO_LONG, CUT_OFF = "too short", "too long", "cut off"
FAULTS = (EMPTY, REPETITION, LEAK, REFUSAL, TOO_SHORT, TOO_LONG, CUT_OFF)  # the worst first; `detect` names one

_LONGEST_LOOP = 16  # words; loops of more are left to the share of repeated n-grams, which needs no search
_LONGEST_PIECE = 4  # characters of a loop within a word
_FEWEST_ECHOED = 3  # words: a prompt such as "a large" is also how honest captions begin
_MARKS = re.compile(r"<\|\w+\|>|<image>|\[/?inst\]|</?s>|^\s*(?:assistant|user)\s*:", re.IGNORECASE | re.MULTILINE)
_SENTENCES = re.compile(r"[.!?:\n]+(?:\s|$)")


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """Where the bounds lie; they are drawn so that lists, names and counted shapes pass.

    Phrases are compared word by word, without case and punctuation. Those of leaks are sought anywhere, those of
    refusals only where a sentence begins: a caption may quote a sign.
    """

    repeats: int = 3  # how often the same words may be said in immediate succession
    characters: int = 16  # the same for up to four characters, spaces aside, as in "hahaha" or "......"
    ngram: int = 5  # words; shorter n-grams recur in honest lists (compare arXiv 2112.11446, table A1)
    ngram_share: float = 0.5  # the largest share of n-grams that were said before in the caption
    leak_words: int = 5  # so many successive words of the prompt are a leak
    leak_phrases: tuple[str, ...] = (
        "as descriptive as possible",
        "write a detailed description",
        "describe the image",
        "describe this image",
        "caption this image",
        "caption for this image",
        "caption for the image",
        "here is a caption",
        "here's a caption",
        "here is a description of",
        "here's a description of",
        "here is a detailed description",
        "here's a detailed description",
    )
    refusal_phrases: tuple[str, ...] = (
        "sorry but i can't",
        "sorry but i cannot",
        "i'm sorry but i can't",
        "i'm sorry but i cannot",
        "i'm sorry i can't",
        "i'm sorry i cannot",
        "i apologize but i",
        "unfortunately i can't",
        "unfortunately i cannot",
        "i'm unable to",
        "i am unable to",
        "i'm not able to",
        "i am not able to",
        "i can't assist",
        "i cannot assist",
        "i can't help with",
        "i cannot help with",
        "i can't provide",
        "i cannot provide",
        "i can't describe",
        "i cannot describe",
        "i can't identify",
        "i cannot identify",
        "i can't see any image",
        "i cannot see any image",
        "i don't see an image",
        "as an ai language model",
        "as an ai assistant",
        "as an ai i",
        "as a language model",
        "no image was provided",
        "there is no image provided",
        "there is no image attached",
        "please provide an image",
        "please provide the image",
        "please upload an image",
        "please upload the image",
    )

    def __post_init__(self) -> None:
        for name in ("repeats", "characters", "ngram", "leak_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the detectors must be at least 1, but it is {getattr(self, name)}.")
        if not 0 <= self.ngram_share <= 1:
            raise ValueError(f"ngram_share is a share between 0 and 1, but it is {self.ngram_share}.")
        for phrase in (*self.leak_phrases, *self.refusal_phrases):
            if not words(phrase):
                raise ValueError(f"A phrase to look for must have a word; found {phrase!r}, which every caption has.")


def detect(
    caption: str | None, prompt: str, config: DetectConfig, min_words: int, max_words: int, ended: bool = True
) -> str | None:
    """The worst fault of a caption, one of `FAULTS`, or None.

    `prompt` is the instruction without what it quotes of a row, such as an alt text: captions may well repeat that.
    `min_words` and `max_words` bound the number of space-separated words. `ended` is whether the captioner came to an
    end by itself; where it ran into its bound on tokens, the caption is "cut off". A caption without a letter or digit
    is "empty".
    """
    said = words(caption) if caption else []
    if not caption or not said:
        return EMPTY
    if _repeats(caption, said, config):
        return REPETITION
    if _MARKS.search(caption) or _leaks(said, words(prompt), config):
        return LEAK
    if _refuses(caption, config.refusal_phrases):
        return REFUSAL
    count = len(caption.split())
    if count < min_words:
        return TOO_SHORT
    if count > max_words:
        return TOO_LONG
    return None if ended else CUT_OFF


def _repeats(caption: str, said: Sequence[str], config: DetectConfig) -> bool:
    piece = rf"(.{{1,{_LONGEST_PIECE}}}?)\1{{{config.characters},}}"
    if re.search(piece, "".join(caption.split())):
        return True
    if len(set(said)) == len(said):
        return False
    return _loops(said, config.repeats) or _share_repeated(said, config.ngram) > config.ngram_share


def _loops(said: Sequence[str], repeats: int) -> bool:
    """Whether some words are said more than `repeats` times in immediate succession."""
    for period in range(1, min(_LONGEST_LOOP, len(said) // (repeats + 1)) + 1):
        run = 0
        for word, later in zip(said, said[period:], strict=False):
            run = run + 1 if word == later else 0
            if run >= period * repeats:
                return True
    return False


def _share_repeated(said: Sequence[str], n: int) -> float:
    """The share of n-grams that were said before; 0 for a caption too short for more than an honest echo."""
    if len(said) < 3 * n:
        return 0.0
    grams = [tuple(said[start : start + n]) for start in range(len(said) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def _leaks(said: Sequence[str], prompt: Sequence[str], config: DetectConfig) -> bool:
    text = _line(said)
    if any(phrase in text for phrase in _lines(config.leak_phrases)):
        return True
    size = config.leak_words
    if any(_line(prompt[start : start + size]) in text for start in range(len(prompt) - size + 1)):
        return True
    if min(len(prompt), len(said)) < _FEWEST_ECHOED:
        return False
    return text.startswith(_line(prompt)) or text in _line(prompt)


def _refuses(caption: str, phrases: tuple[str, ...]) -> bool:
    openings = _lines(phrases)
    return any(_line(words(sentence)).startswith(openings) for sentence in _SENTENCES.split(caption))


@lru_cache(maxsize=8)
def _lines(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_line(words(phrase)) for phrase in phrases)


def _line(said: Sequence[str]) -> str:
    """Words as text in which a phrase is found only at whole words."""
    return f" {' '.join(said)} "
