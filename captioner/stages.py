"""Captioning as a stage: pictures in, a caption with its log-probability and its faults in each style out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from captioner.decoding import decoder_of, score
from captioner.detect import DetectConfig
from captioner.model import BASE
from captioner.retry import WORDS, caption_checked
from captioner.styles import RETRIES, Search, Style, prompts_of
from captioner.task import ALT_COLUMN, ALTS_COLUMN, score_each
from captioner.tower import Tower
from infra.data.clock import clocked

# The columns of a style, `<kind>_<style>`, and their types.
KINDS = {"caption": "string", "logp": "double", "flag": "string", "tries": "int64", "attempt": "int64"}


@dataclass
class Caption:
    """Encodes each image once, speaks of it in every style, and scores the caption that came with it.

    Writes for each style `caption_<style>`, `logp_<style>` (the mean log-probability a token, <= 0), `flag_<style>`
    (what is wrong with the caption, one of `captioner.detect.FAULTS`, or None), `tries_<style>` (how often it was
    decoded) and `attempt_<style>` (which of these stands, from 1); and `logp_alt`, of several alt texts that of the
    first, and `logps_alt` those of all. No row is rejected for a faulty caption: flags are data, and to drop is policy.

    Without `score_alt` alt texts are not scored, and there are no such columns.

    `words` are the fewest and the most words by style; `retries` are how faulty captions are decoded again, in turn.
    """

    tower: Tower  # whose decoders speak; stages that are given the same object share its features
    styles: tuple[Style, ...]
    cpus: float = 1
    gpus: float = 0
    detect: DetectConfig = field(default_factory=DetectConfig)
    words: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    retries: tuple[Search, ...] = RETRIES
    score_alt: bool = True
    reads: tuple[str, ...] = field(init=False)
    views: dict[str, Callable] = field(init=False)
    writes: tuple[str, ...] = field(init=False)
    types: dict[str, str] = field(init=False)
    counted: tuple[str, ...] = field(init=False)
    optional: tuple[str, ...] = (f"logps_{BASE}",)

    def __post_init__(self) -> None:
        names = [style.name for style in self.styles]
        if unknown := sorted(set(self.words) - set(names)):
            raise ValueError(f"words names {', '.join(unknown)}, but the styles are {', '.join(names)}.")
        for name, (fewest, most) in self.words.items():
            if not 0 <= fewest <= most:
                raise ValueError(f"Captions of {fewest} to {most} words cannot be; order the bounds of '{name}'.")
        further = (ALTS_COLUMN,) if self.score_alt else ()
        self.reads, self.views = (self.tower.view, ALT_COLUMN, *further), {self.tower.view: self.tower.fit}
        self.types = {f"{kind}_{name}": type for name in names for kind, type in KINDS.items()}
        self.types |= {f"logp_{BASE}": KINDS["logp"], f"logps_{BASE}": "double[]"} if self.score_alt else {}
        self.writes = tuple(self.types)
        self.counted = tuple(f"{kind}_{name}" for name in names for kind in ("flag", "tries"))

    def setup(self) -> None:
        """Load the captioner; ValueError if a style asks for a decoder that it lacks."""
        self.tower.setup()
        if not self.tower.model.decoders:
            raise ValueError(f"{self.tower.source} holds retrieval weights, which cannot caption; give a captioner.")
        for style in self.styles:
            decoder_of(self.tower.model, style)
            prompts_of(style, [], self.tower.model.vocabulary, self.tower.model.max_length)  # is there room for it?

    @torch.no_grad()
    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Captions of all styles from one encoding."""
        model = self.tower.model
        with clocked("encode"):
            features = self.tower.features(batch[self.tower.view])
        columns: dict[str, list] = {}
        if self.score_alt:
            with clocked("score"):
                first = score(model, features, batch[ALT_COLUMN], Style(name=BASE))
                every = score_each(
                    batch, first, lambda rows, texts: score(model, features[rows], texts, Style(name=BASE))
                )
                columns |= {f"logp_{BASE}": first, f"logps_{BASE}": every}
        for style in self.styles:
            words = self.words.get(style.name, WORDS)
            prompts = prompts_of(style, batch[ALT_COLUMN], model.vocabulary, model.max_length)
            with clocked("generate"):
                said = caption_checked(model, features, style, self.detect, words, self.retries, prompts)
            values = (said.texts, said.logp, said.flags, said.tries, said.attempts)
            columns |= {f"{kind}_{style.name}": column for kind, column in zip(KINDS, values, strict=True)}
        return columns
