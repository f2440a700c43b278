"""A tiny tokenizer and its critics on noise, tasks for the workers of `tests.infra.train.toy`."""

from dataclasses import fields

import numpy as np

from infra.train.optim import OptimConfig
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.task import TokenizerTask
from t2i.tokenizers.vqgan import VQGANConfig

KL = VQGANConfig(
    channels=8, groups=4, multipliers=(1, 2), blocks=1, attention_levels=(1,), latent_channels=3,
    quantizer=GaussianConfig(width=3),
)  # fmt: skip
SUMS = LossConfig(reduction="sum", kl=1e-2)


class Noise(TokenizerTask):
    """The picture of a row is made from its number."""

    def where(self, columns):
        return np.ones(len(columns["row"]), bool)

    def collate(self, rows, draw):
        pixels = [np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8) for row in rows["row"]]
        return super().collate({"pixels": pixels}, draw)


class Panel(Noise):
    """A second critic, smaller and of less weight, wakes four steps after the first."""

    @property
    def critics(self):
        return (self.critic, CriticConfig(channels=4, layers=1, weight=0.3, start_step=self.critic.start_step + 4))

    def updates(self):
        """The first critic begins as the one of `judged`, which is called otherwise."""
        updates, alone = super().updates(), judged().updates()
        updates[1].module.critic[0].load_state_dict(alone[1].module.critic.state_dict())
        return updates


def panel():
    """What `judged` is, with two critics."""
    one = judged()
    return Panel(**{field.name: getattr(one, field.name) for field in fields(one)})


def latents():
    """A KL autoencoder of sums over pixels, and a critic that sleeps for two steps."""
    one = judged()
    return Noise(**{field.name: getattr(one, field.name) for field in fields(one)} | {"model": KL, "losses": SUMS})


def judged():
    """The critic sleeps for two steps."""
    return Noise(
        model=PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=CodebookConfig(size=16, width=4)),
        losses=LossConfig(),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, ema_decay=0.9),
        critic=CriticConfig(channels=8, layers=1, start_step=2),
        reads=("row",),
        where_reads=("row",),
    )
