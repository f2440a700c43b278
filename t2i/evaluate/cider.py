"""CIDEr-D: how much a caption says what the references of its picture say and those of others do not."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from t2i.evaluate.words import tokens

N = 4  # words of the longest n-gram
SIGMA = 6.0  # of the Gaussian that punishes other lengths

Grams = list[Counter[tuple[str, ...]]]
Vectors = list[dict[tuple[str, ...], float]]


def cider(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(B,) scores in [0, 10], the mean over references of ten times the mean similarity of n-grams, n = 1 to 4.

    arXiv 1411.5726, section 5, as COCO's server computes it: n-grams weigh by the log of the share of pictures whose
    references have them, over the pictures given here, so a set of one picture scores 0; lengths are compared in
    bigrams. Words are those of `words.tokens`, not of Stanford's Java tokenizer. None is an empty caption.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(
            f"Each caption needs at least one reference; found {len(captions)} captions, {len(references)} "
            f"pictures, {sum(not each for each in references)} of them without."
        )
    told = [_grams(caption or "") for caption in captions]
    wanted = [[_grams(text) for text in texts] for texts in references]
    found = Counter(gram for texts in wanted for gram in {gram for text in texts for grams in text for gram in grams})
    rarity = {gram: math.log(len(wanted)) - math.log(count) for gram, count in found.items()}
    new = math.log(max(1, len(wanted)))  # the weight of what no reference has
    return np.array(
        [
            10 * float(np.mean([_similarity(caption, text, rarity, new) for text in texts]))
            for caption, texts in zip(told, wanted, strict=True)
        ]
    )


def _grams(text: str) -> Grams:
    """n-grams of a text and how often each occurs, for n = 1 to N."""
    words = tokens(text)
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, N + 1)]


def _similarity(caption: Grams, reference: Grams, rarity: dict[tuple[str, ...], float], new: float) -> float:
    """The mean over n of the clipped cosine of two tf-idf vectors, less for another length."""
    apart = caption[1].total() - reference[1].total()
    similar = 0.0
    for grams, others in zip(caption, reference, strict=True):
        said, true = ({gram: n * rarity.get(gram, new) for gram, n in each.items()} for each in (grams, others))
        shared = sum(min(weight, true[gram]) * true[gram] for gram, weight in said.items() if gram in true)
        norms = math.hypot(*said.values()) * math.hypot(*true.values())
        similar += shared / norms if norms else 0.0
    return similar / N * math.exp(-(apart**2) / (2 * SIGMA**2))
