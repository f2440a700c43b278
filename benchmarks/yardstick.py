"""How little wrong does the yardstick of Shapes see? Its first set of prompts, drawn right, and then harmed.

    python -m benchmarks.yardstick runs/calibrate/ID

Each line is what a model would score whose pictures are wrong in one way alone: a share of the objects is lost, or has
another colour, or is red; the pixels have noise; or a few pictures are drawn again and again. Prints the scores with
their 95 % intervals as a table in Markdown.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Annotated

import numpy as np
import tyro

from infra import storage
from infra.config import from_dict
from infra.store import Artifact
from t2i.evaluate.scenes import COLORS, Scene, Thing
from t2i.evaluate.yardstick import Measured, distances_of, table
from workflows.corpora.shapes import ShapesConfig, render
from workflows.ingest import IngestConfig
from workflows.yardstick import FEATURES, PROMPTS, extractor_of, yardstick_of

SCORES = ("fid", "kid", "precision", "recall", "density", "coverage")
Harm = Callable[[list[Scene], np.random.Generator], list[Scene]]


def some(share: float, change: Callable[[Thing, np.random.Generator], Thing | None]) -> Harm:
    """Change, or leave out, a share of the objects."""

    def harm(scenes: list[Scene], rng: np.random.Generator) -> list[Scene]:
        harmed = []
        for scene in scenes:
            things = [change(thing, rng) if rng.random() < share else thing for thing in scene.objects]
            harmed.append(Scene(tuple(thing for thing in things if thing), scene.background))
        return harmed

    return harm


def other_color(thing: Thing, rng: np.random.Generator) -> Thing:
    """Any colour but its own."""
    others = [color for color in COLORS if color != thing.color]
    return replace(thing, color=others[int(rng.integers(len(others)))])


HARMS: dict[str, Harm] = {
    "drawn right": lambda scenes, rng: scenes,
    "5 % of objects lost": some(0.05, lambda thing, rng: None),
    "20 % of objects lost": some(0.2, lambda thing, rng: None),
    "5 % of colours wrong": some(0.05, other_color),
    "20 % of colours wrong": some(0.2, other_color),
    "20 % of objects red": some(0.2, lambda thing, rng: replace(thing, color="red")),
    "a tenth of the scenes, ten times each": lambda scenes, rng: scenes[: len(scenes) // 10] * 10,
}
NOISE = {"noise of 10 levels": 10, "noise of 30 levels": 30}


def main(path: Annotated[str, tyro.conf.Positional]) -> None:
    """Measure every harm by a yardstick, the folder that `calibrate` made."""
    made = Artifact.open(storage.absolute(path))
    corpus = from_dict(IngestConfig, made.inputs[0].manifest["config"]).corpus
    assert isinstance(corpus, ShapesConfig), "only Shapes can be drawn"
    extract, by = extractor_of(made.inputs[1]), yardstick_of(made)
    lines = storage.read_bytes(made.url(PROMPTS)).decode().splitlines()
    scenes = [Scene.from_dict(json.loads(json.loads(line)["scene"])) for line in lines]
    real = np.load(BytesIO(storage.read_bytes(made.url(FEATURES))))["second"]
    measured = []
    for name in (*HARMS, *NOISE):
        rng = np.random.default_rng(0)
        drawn = HARMS[name](scenes, rng) if name in HARMS else scenes
        images = [render(scene, corpus.size, rng, corpus.jitter).astype(float) for scene in drawn]
        noisy = [np.clip(image + rng.normal(0, NOISE.get(name, 0), image.shape), 0, 255) for image in images]
        features = extract([image.round().astype(np.uint8) for image in noisy])
        measured.append(Measured(name=name, yardstick=by, scores=distances_of(real, features)))
    print(f"{by.corpus}, {by.extractor}, {by.rows} pictures\n")
    print(f"| | {' | '.join(SCORES)} |\n|---|{'---|' * len(SCORES)}")
    for line in table(measured):
        cells = (
            f"{line[score]:.4g} ({line[f'{score}_interval'][0]:.4g} to {line[f'{score}_interval'][1]:.4g})"
            for score in SCORES
        )
        print(f"| {line['name']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    tyro.cli(main)
