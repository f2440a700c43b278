"""How well drawn pictures and their prompts go together, by a CLIP, beside real pictures of the same prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.data.images import decode
from t2i.evaluate.alignment import clip_score, retrieval
from workflows.clips import weights_of
from workflows.corpora.scoring import Row, Scores

Pair = tuple[str, np.ndarray]
"""A prompt, and a picture (H, W, 3) uint8."""


def alignment_scores(clip: str, drawn: Sequence[Row], real: Sequence[Pair] = ()) -> Scores:
    """`clip_score`, `retrieval_text_r@1` and `retrieval_image_r@1` of what `sample` drew; as `real_...` of real pairs.

    A find is right where the prompt is equal. Each score has its 95 % interval and its rows. Of a prompt that is too
    long for the CLIP its beginning is read; `clip_cut` says of how many. No scores where nothing was drawn.
    """
    if not drawn:
        return {}
    from t2i.clip.embedder import Embedder  # brings transformers

    embedder = Embedder(weights_of(clip))
    pairs = [(one["prompt"], decode(one["image"])) for one in drawn]
    scores: Scores = {"clip_cut": sum(embedder.cut([prompt for prompt, _ in pairs]))} | _of(embedder, pairs)
    if real:
        scores |= {f"real_{name}": value for name, value in _of(embedder, real).items()}
    return scores


def _of(embedder: Any, pairs: Sequence[Pair]) -> Scores:
    prompts, pictures = zip(*pairs, strict=True)
    images, texts = embedder.embed_images(pictures).numpy(), embedder.embed_texts(prompts).numpy()
    found = {f"retrieval_{name}": each for name, each in retrieval(images, texts, prompts, prompts, ks=(1,)).items()}
    scores: Scores = {}
    for name, each in {"clip_score": clip_score(images, texts), **found}.items():
        scores |= each.named(name)
        if not np.isfinite(each.interval).all():  # of a single picture
            del scores[f"{name}_interval"]
    return scores
