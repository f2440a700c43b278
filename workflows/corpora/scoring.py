"""How captions and pictures of a corpus are scored: by the true scene where it is known, else by their words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from t2i.evaluate import intervals, scenes, skills
from t2i.evaluate.cider import cider
from t2i.evaluate.intervals import Estimate
from t2i.evaluate.words import word_rows
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
    lines: list[Row] = field(default_factory=list)  # of `results.jsonl`, one a picture that was judged
    judged: list[skills.Judged] = field(default_factory=list)  # these pictures


def caption_scores(corpus: Corpus, rows: Sequence[Row]) -> Scores:
    """Scores of rows with `caption_short`, `caption_descriptive`, `caption_alt` and the truth; none for no rows.

    `caption_f1` is of the longest style that there is, `short_caption_f1` of the short one beside it, `alt_text_f1` of
    the alt texts where the same rule can measure them, and `caption_gain` by how much captions are above these, on the
    rows that have both. `chance_f1` is what the very captions reach when each is given to another row: what can be had
    by knowing the corpus, but not the image. `caption_cider` compares words with the reference's. A score's 95 %
    interval over rows has its name and `_interval`.
    """
    score = {"shapes": _shapes_captions, "nlvr": _nlvr_captions, "words": _word_captions}[corpus]
    return score(rows) if rows else {}


def picture_scores(corpus: Corpus, wanted: Sequence[Row], images: Sequence[np.ndarray]) -> Pictures:
    """Scores of (H, W, 3) uint8 pictures against the `scene` (JSON, or None) that was asked for.

    Only Shapes can be read back from pixels. `scene_score` is the share of pictures with every object right and nothing
    else there, `object_score` that of wanted objects, `skill_<name>` that of the facts of a skill; each with its
    pictures (`_n`) and 95 % interval (`_interval`). Where a row has a `prompt`, what it leaves unsaid is not asked for;
    `name` and `tag`, where it has them, stand in its line.
    """
    known = [index for index, row in enumerate(wanted) if row["scene"]]
    right: list[bool | None] = [None] * len(images)
    notes = [""] * len(images)
    if corpus != "shapes" or not known:
        return Pictures(right=right, notes=notes)
    asked = [scenes.Scene.from_dict(json.loads(wanted[index]["scene"])) for index in known]
    seen = scenes.read_many(np.stack([images[index] for index in known]))
    judged, lines = [], []
    for index, got, want in zip(known, seen, asked, strict=True):
        row = wanted[index]
        prompt = row.get("prompt") or scenes.describe(want)
        facts = skills.asked_for(prompt, want)
        judged.append(skills.judge(got, want, facts))
        told = skills.metadata(prompt, want, row.get("tag") or "", facts)
        lines.append(skills.result(row.get("name") or str(index), told, got, judged[-1]))
        right[index] = judged[-1].correct
        notes[index] = "as asked" if right[index] else _fault(got, want, judged[-1])
    scores: Scores = {}
    for name, estimate in skills.skill_scores(judged).items():
        scores |= estimate.named(name)
    return Pictures(scores=scores, right=right, notes=notes, lines=lines, judged=judged)


def _shapes_captions(rows: Sequence[Row]) -> Scores:
    rows = [row for row in rows if row["scene"]]
    truth = [scenes.Scene.from_dict(json.loads(row["scene"])) for row in rows]
    if not rows:
        return {}
    scores: Scores = {"caption_n": len(rows)}
    said = None
    if "caption_descriptive" in rows[0]:
        descriptive = [row["caption_descriptive"] for row in rows]
        said = scenes.caption_facts(descriptive, truth)
        scores |= _named("caption", _f1(said))
        scores |= _named("chance", {"f1": _f1(scenes.caption_facts(_given_away(descriptive), truth))["f1"]})
    if "caption_short" in rows[0]:
        short = scenes.caption_facts([row["caption_short"] for row in rows], truth, "short")
        scores |= _named("short_caption", {"f1": _f1(short)["f1"]})
    scores |= _ciders(rows)
    alts = [row["caption_alt"] for row in rows]
    if any(alts):
        told = np.array([bool(alt) for alt in alts])
        alt = scenes.caption_facts(
            [alt for alt in alts if alt], [each for each, has in zip(truth, told, strict=True) if has]
        )
        scores |= _named("alt_text", {"f1": _f1(alt)["f1"]})
        if said is not None:
            ours, theirs = (2 * each[:, 0] for each in (said[told], alt))
            of, their_of = (each[:, 1] + each[:, 2] for each in (said[told], alt))
            scores |= _named("caption", {"gain": intervals.difference(ours, theirs, of, their_of)})
    return scores


def _nlvr_captions(rows: Sequence[Row]) -> Scores:
    rows = [row for row in rows if row["scene"] and row["reference_short"]]
    truth = [nlvr.read(json.loads(row["scene"])) for row in rows]
    if not rows:
        return {}
    scores: Scores = {"caption_n": len(rows)}
    if "caption_descriptive" in rows[0]:
        descriptive = [row["caption_descriptive"] for row in rows]
        said = nlvr.caption_facts(descriptive, truth)
        scores |= _named("caption", _f1(said) | {"exact": intervals.share(said[:, 3])})
        scores |= _named("chance", {"f1": _f1(nlvr.caption_facts(_given_away(descriptive), truth))["f1"]})
    if "caption_short" in rows[0]:
        short = word_rows([row["caption_short"] for row in rows], [row["reference_short"] for row in rows])
        scores |= _named("short_caption", {name: intervals.share(short[name]) for name in ("f1", "exact")})
    return scores | _ciders(rows)


def _word_captions(rows: Sequence[Row]) -> Scores:
    scores: Scores = {}
    for style, prefix in (("short", "short_caption"), ("descriptive", "caption")):
        told = [row for row in rows if row.get(f"reference_{style}") and f"caption_{style}" in row]
        if not told:
            continue
        captions, references = [row[f"caption_{style}"] for row in told], [row[f"reference_{style}"] for row in told]
        said = word_rows(captions, references)
        scores |= _named(prefix, {name: intervals.share(said[name]) for name in ("f1", "exact")})
        scores[f"{prefix}_n"] = len(told)
        scores |= _named("chance", {"f1": intervals.share(word_rows(_given_away(captions), references)["f1"])})
        if any(row["caption_alt"] != reference for row, reference in zip(told, references, strict=True)):
            scores |= _word_alts(told, references, said["f1"])
    scores |= _ciders(rows)
    if "caption_f1" not in scores:  # short captions only
        scores = {name.removeprefix("short_"): value for name, value in scores.items()}
    return scores


def _word_alts(rows: Sequence[Row], references: Sequence[str], said: Sequence[float]) -> Scores:
    """`alt_text_f1` and `caption_gain` of the rows that have an alt text; none where none has."""
    told = [
        (row["caption_alt"], each, f1)
        for row, each, f1 in zip(rows, references, said, strict=True)
        if row["caption_alt"]
    ]
    if not told:
        return {}
    alts, references, said = zip(*told, strict=True)
    theirs = word_rows(alts, references)["f1"]
    return _named("alt_text", {"f1": intervals.share(theirs)}) | _named(
        "caption", {"gain": intervals.difference(said, theirs)}
    )


def _ciders(rows: Sequence[Row]) -> Scores:
    """CIDEr-D of each style that has references, against the one of each row."""
    scores: Scores = {}
    for style, prefix in (("short", "short_caption"), ("descriptive", "caption")):
        told = [row for row in rows if row.get(f"reference_{style}") and f"caption_{style}" in row]
        if told:
            each = cider([row[f"caption_{style}"] for row in told], [[row[f"reference_{style}"]] for row in told])
            scores |= _named(prefix, {"cider": intervals.mean(each)})
    return scores


def _f1(facts: np.ndarray) -> dict[str, Estimate]:
    """Pooled `f1`, `precision` and `recall` of facts (N, 3 or more): right, said and true ones of each caption."""
    right, said, true = facts[:, 0], facts[:, 1], facts[:, 2]
    of = {"f1": (2 * right, said + true), "precision": (right, said), "recall": (right, true)}
    nothing = Estimate(0.0, (0.0, 1.0), 0)  # where nothing is said, nothing is right
    return {name: intervals.share(*each) if each[1].any() else nothing for name, each in of.items()}


def _named(prefix: str, estimates: dict[str, Estimate]) -> Scores:
    """Values and intervals as they stand in a table."""
    scores: Scores = {}
    for name, each in estimates.items():
        scores |= {f"{prefix}_{name}": each.value, f"{prefix}_{name}_interval": each.interval}
    return scores


def _given_away(captions: Sequence[str | None]) -> list[str | None]:
    """Every caption at another row: half the rows further on."""
    half = len(captions) // 2
    return [*captions[half:], *captions[:half]]


def _fault(got: scenes.Scene, want: scenes.Scene, judged: skills.Judged) -> str:
    extra = len(got.objects) > len(want.objects)
    return f"{judged.whole} of {judged.wanted} objects" + (" and one too many" if extra else "")
