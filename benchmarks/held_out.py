"""What it costs to look on: CPU-seconds of each measurement of the demo's tokenizer and prior, with pictures.

python -m benchmarks.held_out /tmp/looked-on
"""

from dataclasses import replace

import tyro

from infra.cluster import laptop
from infra.metrics import HELD_OUT, read_scalars
from infra.store import Store
from infra.train import onlooker
from infra.train.loop import TrainConfig
from workflows.mix import MixConfig
from workflows.recipes import demo
from workflows.text_to_image import run


def main(folder: tyro.conf.Positional[str]) -> None:
    """Train both for a minute on 12,000 scenes with their own alt texts, looked at every few seconds."""
    onlooker.FIRST_SECONDS, onlooker.EVERY_SECONDS, onlooker.SHARE, onlooker.LOOK_SECONDS = 5.0, 5.0, 1, 1.0
    recipe = demo()
    recipe = replace(
        recipe,
        corpus=replace(recipe.corpus, corpus=replace(recipe.corpus.corpus, samples=12_000, labelled=500)),
        captioner=None,
        captions=None,
        mix=MixConfig(weights={"alt": 1.0}),
        tokenizer=replace(recipe.tokenizer, train=_saved_often(recipe.tokenizer.train, 200)),
        prior=replace(recipe.prior, train=_saved_often(recipe.prior.train, 240)),
        sample=replace(recipe.sample, count=16),
    )
    store = Store(folder, laptop())
    run(recipe, store)
    for artifact in store.made:
        for row in read_scalars(artifact.url(HELD_OUT)):
            print(artifact.step, row)


def _saved_often(train: TrainConfig, steps: int) -> TrainConfig:
    return replace(train, steps=steps, save_every_steps=steps // 8)


if __name__ == "__main__":
    tyro.cli(main)
