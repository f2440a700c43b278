"""Scoring as a stage: how well each caption of a picture, its alt text among them, speaks of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from captioner.clip import Clip
from captioner.matching import Matching
from captioner.model import BASE
from captioner.task import ALTS_COLUMN, score_each
from captioner.tower import Tower


@dataclass
class Match:
    """Scores the alt text and the caption of each style by one encoding of a picture for all of them.

    Writes `match_<style>`, the probability in [0, 1] that the text speaks of the picture, for "alt" and each style;
    where a CLIP is given also `clip_<style>`, the cosine in [-1, 1], and `clip_cut_<style>`, whether the text exceeds
    CLIP's 77 tokens and was scored by its beginning alone. All are null where there is no text; of several alt texts
    they are those of the first, and `matches_alt` and `clips_alt` those of all. What is too low is for `mix` to say.
    """

    tower: Tower  # the captioner's: give the stage that captions the same object, and pictures are encoded once
    styles: tuple[str, ...]
    matcher: Tower | None = None  # whose matching head judges, such as published retrieval weights; else the tower's
    clip: str | None = None  # the folder or hub's name of a CLIPModel
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(init=False)
    views: dict[str, Callable] = field(init=False)
    writes: tuple[str, ...] = field(init=False)
    types: dict[str, str] = field(init=False)
    optional: tuple[str, ...] = (f"matches_{BASE}", f"clips_{BASE}")
    _eyes: Tower | None = field(default=None, init=False, repr=False)  # whose features the judge reads
    _judge: Matching | None = field(default=None, init=False, repr=False)
    _clip: Clip | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        scored = (BASE, *self.styles)
        kinds = ("match", "clip", "clip_cut") if self.clip else ("match",)
        towers = [tower for tower in (self.tower, self.matcher) if tower is not None]
        self.views = {tower.view: tower.fit for tower in towers}
        seen = (*self.views, "pixels") if self.clip else tuple(self.views)
        self.reads = (*seen, ALTS_COLUMN, *(f"caption_{style}" for style in scored))
        self.types = dict.fromkeys(self.optional if self.clip else self.optional[:1], "double[]")
        self.writes = (*(f"{kind}_{style}" for style in scored for kind in kinds), *self.types)

    def setup(self) -> None:
        """Load the models; ValueError if none of them has a matching head."""
        self.tower.setup()
        judge = self.matcher or self.tower
        judge.setup()
        if judge.model.matching is None or not judge.model.matching.config.match:
            raise ValueError(
                f"{judge.source} has no matching head. Train the base with a weight for `match`, "
                "or name published retrieval weights to score with."
            )
        self._judge = judge.model.matching
        self._eyes = self.tower if judge.sees_as(self.tower) else judge  # one tower under two names runs once
        if self.clip:
            kind = torch.bfloat16 if self.tower.precision == "bf16" else torch.float32
            self._clip = Clip(self.clip, "cuda" if self.gpus else "cpu", kind)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Scores of all texts of each row."""
        assert self._eyes is not None, "setup comes first"
        assert self._judge is not None
        features = self._eyes.features(batch[self._eyes.view])
        images = self._clip.encode(batch["pixels"]) if self._clip is not None else None
        judge, clip = self._judge, self._clip
        columns: dict[str, list] = {}
        for style in (BASE, *self.styles):
            texts: Sequence[str | None] = batch[f"caption_{style}"]
            columns[f"match_{style}"] = judge.match(features, texts)
            if clip is not None and images is not None:
                found = clip.similarity(images, texts)
                columns |= {f"clip_{style}": found.values, f"clip_cut_{style}": found.cut}
        columns[f"matches_{BASE}"] = score_each(
            batch, columns[f"match_{BASE}"], lambda rows, texts: judge.match(features[rows], texts)
        )
        if clip is not None and images is not None:
            columns[f"clips_{BASE}"] = score_each(
                batch, columns[f"clip_{BASE}"], lambda rows, texts: clip.similarity(images[rows], texts).values
            )
        return columns
