"""Captions that are looked at: the faulty ones are decoded again, other ways, and the best attempt is kept."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captioner.decoding import Captions, caption
from captioner.detect import FAULTS, DetectConfig, detect
from captioner.model import Captioner
from captioner.styles import RETRIES, Search, Style, fill

WORDS = (1, 200)  # the fewest and the most words of a caption in a style without bounds of its own


@dataclass(frozen=True)
class Checked:
    """One caption a row with the mean log-probability of its tokens, what is still wrong with it, and the attempts.

    `flags` holds one of `FAULTS` or None; `tries` is how often the row was decoded, 1 where nothing was wrong;
    `attempts` is which of these stands, counted from 1 as `decodings` lists them.
    """

    texts: list[str]
    logp: list[float]
    flags: list[str | None]
    tries: list[int]
    attempts: list[int]


def decodings(
    style: Style, words: tuple[int, int] = WORDS, retries: Sequence[Search] = RETRIES
) -> list[dict[str, Any]]:
    """The settings of the first decoding and of those that faulty captions go through, in turn, as plain data."""
    return [
        {**asdict(search), "min_tokens": asked.min_tokens, "max_tokens": asked.max_tokens}
        for asked, search in _attempts(style, words, retries)
    ]


@torch.no_grad()
def caption_checked(
    captioner: Captioner,
    features: Tensor,
    style: Style,
    config: DetectConfig,
    words: tuple[int, int] = WORDS,
    retries: Sequence[Search] = RETRIES,
    prompts: Sequence[str] | None = None,
) -> Checked:
    """Captions in one style for `features` (B, N, D), of `words` (fewest, most) words each.

    Rows that `detect` finds faulty, and only they, are decoded by the searches of `retries` in turn while the fault
    lasts. The attempt with the least fault stands, the earliest of equals: what a captioner says unasked is likelier
    true. Retries are told the fewest words as fewest tokens, which is what a caption that is too short lacks.
    """
    first = caption(captioner, features, style, prompts)
    flags = _judge(first, style, config, words)
    texts, logp, tries, standing = list(first.texts), list(first.logp), [1] * len(flags), [1] * len(flags)
    for number, (longer, search) in enumerate(_attempts(style, words, retries)[1:], start=2):
        faulty = [row for row, flag in enumerate(flags) if flag]
        size = max(1, len(features) // search.beams)  # beams at a time: no more than there were rows at first
        for rows in (faulty[start : start + size] for start in range(0, len(faulty), size)):
            asked = [prompts[row] for row in rows] if prompts else None
            again = caption(captioner, features[rows], longer, asked, search)
            for place, (row, flag) in enumerate(zip(rows, _judge(again, style, config, words), strict=True)):
                tries[row] += 1
                if _rank(flag) > _rank(flags[row]):
                    texts[row], logp[row], flags[row] = again.texts[place], again.logp[place], flag
                    standing[row] = number
    return Checked(texts, logp, flags, tries, standing)


def _attempts(style: Style, words: tuple[int, int], retries: Sequence[Search]) -> list[tuple[Style, Search]]:
    longer = replace(style, min_tokens=min(max(style.min_tokens, words[0]), style.max_tokens))
    return [(style, Search(beams=style.beams)), *((longer, search) for search in retries)]


def _judge(captions: Captions, style: Style, config: DetectConfig, words: tuple[int, int]) -> list[str | None]:
    return [
        detect(text, fill(style.prompt, None), config, *words, ended=ended)
        for text, ended in zip(captions.texts, captions.ended, strict=True)
    ]


def _rank(flag: str | None) -> int:
    """The higher, the better."""
    return FAULTS.index(flag) if flag else len(FAULTS)
