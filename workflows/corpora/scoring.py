"""How captions and pictures of a corpus are scored: by the true scene where it is known, else by their words."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from t2i.evaluate import scenes
from t2i.evaluate.words import word_scores
from workflows.corpora import nlvr

Corpus = Literal["shapes", "nlvr", "words"]
Row = dict[str, Any]
Scores = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Scores of pictures, and for each of them whether it is right (None: not known) and a few words on that."""

    scores: Scores = field(default_factory=dict)
    right: list[bool | None]
    notes: list[str]


def caption_scores(corpus: Corpus, rows: Sequence[Row]) -> Scores:
    """Scores of rows with `caption_short`, `caption_descriptive`, `caption_alt` and the truth; none for no rows.

    `caption_f1` is of the longest style that there is, `short_caption_f1` of the short one beside it, `alt_text_f1` of
    the alt texts where the same rule can measure them. `chance_f1` is what the very captions reach when each is given
    to another row: what can be had by knowing the corpus, but not the image.
    """
    score = {"shapes": _shapes_captions, "nlvr": _nlvr_captions, "words": _word_captions}[corpus]
    return score(rows) if rows else {}


def picture_scores(corpus: Corpus, wanted: Sequence[str | None], images: Sequence[np.ndarray]) -> Pictures:
    """Scores of (H, W, 3) uint8 pictures against the scenes (JSON) that were asked for.

    Only Shapes can be read back from pixels. `scene_score` is the share of pictures with every object right and nothing
    else there, `object_score` that of wanted objects; each with its trials (`_n`) and 95 % interval (`_interval`).
    """
    known = [index for index, scene in enumerate(wanted) if scene]
    right: list[bool | None] = [None] * len(images)
    notes = [""] * len(images)
    if corpus != "shapes" or not known:
        return Pictures(right=right, notes=notes)
    asked = [scenes.Scene.from_dict(json.loads(wanted[index] or "")) for index in known]
    seen = scenes.read_many(np.stack([images[index] for index in known]))
    for index, got, want in zip(known, seen, asked, strict=True):
        right[index] = got.objects == want.objects
        notes[index] = "as asked" if right[index] else _fault(got, want)
    scores: Scores = dict(scenes.scene_scores(seen, asked))
    for name, n in (("scene_score", len(asked)), ("object_score", sum(len(want.objects) for want in asked))):
        scores |= {f"{name}_n": n, f"{name}_interval": wilson(scores[name], n)}
    return Pictures(scores=scores, right=right, notes=notes)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share of `n` independent trials (Wilson 1927); (0, 1) for none."""
    if n == 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _shapes_captions(rows: Sequence[Row]) -> Scores:
    rows = [row for row in rows if row["scene"]]
    truth = [scenes.Scene.from_dict(json.loads(row["scene"])) for row in rows]
    if not rows:
        return {}
    scores: Scores = {"caption_n": len(rows)}
    if "caption_descriptive" in rows[0]:
        descriptive = [row["caption_descriptive"] for row in rows]
        found = scenes.caption_scores(descriptive, truth)
        scores |= {f"caption_{name}": found[name] for name in ("f1", "precision", "recall")}
        scores["chance_f1"] = scenes.caption_scores(_given_away(descriptive), truth)["f1"]
    if "caption_short" in rows[0]:
        short = scenes.caption_scores([row["caption_short"] for row in rows], truth, "short")
        scores["short_caption_f1"] = short["f1"]
    return scores | _alt_scores(lambda texts, of: scenes.caption_scores(texts, of)["f1"], rows, truth)


def _nlvr_captions(rows: Sequence[Row]) -> Scores:
    rows = [row for row in rows if row["scene"] and row["reference_short"]]
    truth = [nlvr.read(json.loads(row["scene"])) for row in rows]
    if not rows:
        return {}
    scores: Scores = {"caption_n": len(rows)}
    if "caption_descriptive" in rows[0]:
        descriptive = [row["caption_descriptive"] for row in rows]
        found = nlvr.caption_scores(descriptive, truth)
        scores |= {f"caption_{name}": found[name] for name in ("f1", "precision", "recall", "exact")}
        scores["chance_f1"] = nlvr.caption_scores(_given_away(descriptive), truth)["f1"]
    if "caption_short" in rows[0]:
        short = word_scores([row["caption_short"] for row in rows], [row["reference_short"] for row in rows])
        scores |= {f"short_caption_{name}": short[name] for name in ("f1", "exact")}
    return scores


def _word_captions(rows: Sequence[Row]) -> Scores:
    scores: Scores = {}
    for style, prefix in (("short", "short_caption"), ("descriptive", "caption")):
        told = [row for row in rows if row.get(f"reference_{style}") and f"caption_{style}" in row]
        if not told:
            continue
        captions, references = [row[f"caption_{style}"] for row in told], [row[f"reference_{style}"] for row in told]
        found = word_scores(captions, references)
        scores |= {f"{prefix}_f1": found["f1"], f"{prefix}_exact": found["exact"], f"{prefix}_n": len(told)}
        scores["chance_f1"] = word_scores(_given_away(captions), references)["f1"]
        if any(row["caption_alt"] != reference for row, reference in zip(told, references, strict=True)):
            scores |= _alt_scores(lambda texts, of: word_scores(texts, of)["f1"], told, references)
    if "caption_f1" not in scores:  # short captions only
        scores = {name.removeprefix("short_"): value for name, value in scores.items()}
    return scores


def _alt_scores(score: Callable[[list[str], list[Any]], float], rows: Sequence[Row], truth: Sequence[Any]) -> Scores:
    """`alt_text_f1` of the rows that have an alt text; none where none has."""
    told = [(row["caption_alt"], each) for row, each in zip(rows, truth, strict=True) if row["caption_alt"]]
    return {"alt_text_f1": score([text for text, _ in told], [each for _, each in told])} if told else {}


def _given_away(captions: Sequence[str | None]) -> list[str | None]:
    """Every caption at another row: half the rows further on."""
    half = len(captions) // 2
    return [*captions[half:], *captions[:half]]


def _fault(got: scenes.Scene, want: scenes.Scene) -> str:
    hits = len(set(got.objects) & set(want.objects))
    extra = len(got.objects) > len(want.objects)
    return f"{hits} of {len(want.objects)} objects" + (" and one too many" if extra else "")
