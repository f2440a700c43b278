"""Labels for Cornell NLVR: three boxes of coloured objects and one human sentence, which may be false.

Suhr, Lewis, Yeh and Artzi, "A Corpus of Natural Language for Visual Reasoning", ACL 2017 (CC-BY-4.0). A key reads
`nlvr-<split>-<scene>-<permutation>`. The six permutations of a scene show the same three boxes in another order, and
the metadata names the boxes without saying in which order the picture has them. So a caption here describes a *set* of
boxes, and every score is free of order. The published splits are kept; 34 of the 990 `test` scenes (nearly all of them
simple towers) also occur in `dev`.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from infra import strict
from infra.config import fingerprint

SHAPES = ("circle", "square", "triangle")
COLORS = ("black", "blue", "yellow")
SIZES = ("small", "medium", "large")  # medium is by far the most frequent and goes unsaid
NUMBERS = ("one", "two", "three")

# 500 of the 989 `dev` scenes hash below this share; one of the six permutations of each makes 500 labelled rows.
LABELLED_SHARE = 0.515

# A runaway caption may name dozens of boxes: those past this many match nothing, so that matching stays cheap.
MATCHED_BOXES = 6

Box = Counter[tuple[str, str, str]]  # (shape, colour, size) -> how many

_KEY = re.compile(r"nlvr-(dev|test)-(\d+-\d+)-(\d)")
_BOX = re.compile(rf"\b({'|'.join(NUMBERS)}) box(?:es)? with\b")
_OBJECTS = re.compile(
    rf"\b(\d{{1,2}}) (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s?\b",
)


def label(key: str, caption: str | None, meta: dict | None) -> dict[str, str | None]:
    """The columns that NLVR's own metadata gives a row; whether its sentence is true is not among them.

    Every `test` row carries reference captions, for evaluation, as do 500 `dev` rows, for fine-tuning. Raises
    ValueError for a row that is not NLVR's.
    """
    match = _KEY.fullmatch(key)
    if match is None or not isinstance(meta, dict) or "boxes_unordered" not in meta:
        raise ValueError(f"{key!r} is not an NLVR row: it needs a key like nlvr-dev-1037-0-5 and boxes in its json.")
    part, scene, permutation = match.groups()
    boxes = read(meta["boxes_unordered"])
    labelled = part == "test" or (share(scene) < LABELLED_SHARE and int(permutation) == int(share(scene, "order") * 6))
    return {
        "split": "train" if part == "dev" else "test",
        "caption_alt": caption,
        "reference_short": summarize(boxes) if labelled else None,
        "reference_descriptive": describe(boxes) if labelled else None,
        "scene": strict.dumps(meta["boxes_unordered"], separators=(",", ":")),
    }


def share(scene: str, salt: str = "labelled") -> float:
    """A number in [0, 1) that depends on the scene alone."""
    return int(fingerprint([salt, scene])[:8], 16) / 16**8


def read(boxes: Sequence[Sequence[dict]]) -> list[Box]:
    """The boxes of a row's metadata, or of its decoded `scene` column; where in a box an object lies is dropped."""
    return [Counter((item["shape"], item["color"], item["size"]) for item in box) for box in boxes]


def describe(boxes: Sequence[Box]) -> str:
    """The descriptive caption: every object of every box, from the emptiest box to the fullest."""
    alike = Counter(tuple(sorted(box.items())) for box in boxes)
    order = sorted(alike.items(), key=lambda entry: (sum(count for _, count in entry[0]), entry[0]))
    return ", ".join(f"{NUMBERS[many - 1]} {'box' if many == 1 else 'boxes'} with {_list(box)}" for box, many in order)


def summarize(boxes: Sequence[Box]) -> str:
    """The short caption: how many objects of each colour, over all boxes, as in "4 black and 2 yellow squares"."""
    total = sum(boxes, Counter())
    shapes = {shape for shape, _, _ in total}
    counts = Counter()
    for (_, color, _), count in total.items():
        counts[color] += count
    noun = shapes.pop() if len(shapes) == 1 else "object"
    plural = "" if counts.total() == 1 else "s"
    return " and ".join(f"{count} {color}" for color, count in sorted(counts.items())) + f" {noun}{plural}"


def parse(caption: str) -> list[Box]:
    """The boxes a descriptive caption states; words outside the grammar of `describe` are passed over."""
    words = " ".join(re.findall(r"[a-z0-9]+", caption.lower()))
    boxes: list[Box] = []
    _, *parts = _BOX.split(words)
    for many, text in zip(parts[::2], parts[1::2], strict=True):
        box: Box = Counter()
        for count, size, color, shape in _OBJECTS.findall(text):
            box[shape, color, size or "medium"] += int(count)
        boxes += [+box for _ in range(NUMBERS.index(many) + 1)]
    return boxes


def caption_scores(captions: Sequence[str | None], scenes: Sequence[Sequence[Box]]) -> dict[str, float]:
    """How well descriptive captions state their scenes: `precision`, `recall`, `f1` over objects, `exact`, and `n`."""
    right, stated, there, exact = (int(count) for count in caption_facts(captions, scenes).sum(0))
    return {
        "precision": right / max(stated, 1),
        "recall": right / max(there, 1),
        "f1": 2 * right / max(stated + there, 1),
        "exact": exact / max(len(captions), 1),
        "n": len(captions),
    }


def caption_facts(captions: Sequence[str | None], scenes: Sequence[Sequence[Box]]) -> np.ndarray:
    """(N, 4) of each caption: objects that are right, that are stated, that are there, and 1 where nothing is wrong.

    The boxes of a caption are matched to the scene's so that most objects agree; an object counts only with its shape,
    colour and size right, in the right company. Nothing is wrong where no object is missing either.
    """
    counts = np.zeros((len(captions), 4), int)
    for count, caption, scene in zip(counts, captions, scenes, strict=True):
        boxes = parse(caption or "")
        right = _agreement(boxes[:MATCHED_BOXES], scene)
        stated, there = (sum(box.total() for box in each) for each in (boxes, scene))
        count[:] = right, stated, there, len(boxes) == len(scene) and right == stated == there
    return counts


def _agreement(boxes: Sequence[Box], scene: Sequence[Box]) -> int:
    """Objects that two sets of boxes share under their best matching."""
    few, many = sorted((list(boxes), list(scene)), key=len)
    return max(
        sum((a & b).total() for a, b in zip(few, choice, strict=True))
        for choice in itertools.permutations(many, len(few))
    )


def _list(box: tuple[tuple[tuple[str, str, str], int], ...]) -> str:
    phrases = []
    for (shape, color, size), count in box:
        words = (str(count), "" if size == "medium" else size, color, shape + ("s" if count > 1 else ""))
        phrases.append(" ".join(word for word in words if word))
    return " and ".join(phrases) or "nothing"
