"""A page on which a person judges blind pairs of pictures or captions, and what such answers come to."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from t2i.evaluate import intervals
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.report import data_uri, template

TIE = "tie"
# A data block ends at "</script", and a browser also looks for "<!--" in it.
_HTML = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


@dataclass(frozen=True, kw_only=True)
class Side:
    """What stands on one side: a picture (encoded) or a text, and the mark by which its key knows it."""

    mark: str
    image: bytes | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two sides, the left one first, and what both are of: a prompt, or a picture."""

    id: str
    sides: tuple[Side, Side]
    prompt: str | None = None
    image: bytes | None = None


def render(page: str, question: str, pairs: Sequence[Pair]) -> str:
    """The page as HTML; `page` is its id. It says nowhere whose a side is.

    Prompts and captions are anybody's: they lie in a block of data, become text alone, and no other script may run.
    """
    told = [
        {
            "id": pair.id,
            "prompt": pair.prompt,
            "image": data_uri(pair.image) if pair.image else None,
            "sides": [
                {"mark": side.mark, "text": side.text, "image": data_uri(side.image) if side.image else None}
                for side in pair.sides
            ],
        }
        for pair in pairs
    ]
    data = json.dumps({"page": page, "pairs": told}, ensure_ascii=False, allow_nan=False)
    data = data.encode(errors="replace").decode().translate(_HTML)
    return template("rate.html.jinja").render(question=question, data=Markup(data), digest=_digest)


def seal(page: str, rater: str, answers: Mapping[str, str]) -> str:
    """A checksum of answers, 16 hexadecimal digits, as the page makes it: FNV-1a of 64 bits.

    It finds files that were cut or edited. It is no signature: who reads the page's script can make one.
    """
    words = "\n".join([page, rater, *(f"{pair} {answers[pair]}" for pair in sorted(answers))])
    found = 0xCBF29CE484222325
    for byte in words.encode(errors="replace"):
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return f"{found:016x}"


def check(ratings: Any, key: Mapping[str, Any]) -> dict[str, str]:
    """The answers of one file: of each pair a mark, or TIE; ValueError where they are none, or of another page."""
    if not isinstance(ratings, dict) or not isinstance(answers := ratings.get("answers"), dict):
        raise ValueError("it holds no answers, as the page's button writes them")
    texts = [ratings.get(name) for name in ("page", "rater", "seal")]
    page, rater, sealed = (text if isinstance(text, str) else "" for text in texts)
    if page != key["page"]:
        raise ValueError(f"its answers are of the page {page[:40]!r}, not of {key['page']}")
    if not answers:
        raise ValueError("nothing was judged yet")
    for pair, answer in answers.items():
        if pair not in key["pairs"]:
            raise ValueError(f"it judges a pair {str(pair)[:40]!r} that its page does not have")
        if answer != TIE and answer not in key["pairs"][pair]:
            raise ValueError(f"its answer to the pair {pair} is none of that pair's sides")
    if sealed != seal(page, rater, answers):
        raise ValueError("it was changed after the page wrote it: its seal does not fit its answers")
    return answers


def score(several: Iterable[Mapping[str, str]], key: Mapping[str, Any]) -> tuple[Estimate, dict[str, int]]:
    """The first one's win rate, a tie being half, over pairs, and how often each won; of a pair the mean of raters."""
    by_pair: dict[str, list[float]] = {}
    counts = {"first": 0, "second": 0, "ties": 0}
    for answers in several:
        for pair, answer in answers.items():
            won = "ties" if answer == TIE else "first" if answer == key["pairs"][pair][0] else "second"
            counts[won] += 1
            by_pair.setdefault(pair, []).append({"first": 1.0, "second": 0.0, "ties": 0.5}[won])
    return intervals.share([float(np.mean(values)) for values in by_pair.values()]), counts


def _digest(text: str) -> Markup:
    """The source of a script or style as its content policy names it."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()}'")
