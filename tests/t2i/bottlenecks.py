"""Tiny tokenizers whose quantizers draw, or follow what they saw: tasks for the workers of `tests.infra.train.toy`."""

from dataclasses import fields, replace

from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.lookup_free import LookupFreeConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.vq_vae import VQVAEConfig
from tests.t2i.judged import Noise, judged

AVERAGED = CodebookConfig(size=24, width=4, ema=0.8, dead_below=1.5)  # a few codes die every step


def task(model, critic, losses=None):
    """What `judged` is, with another model; one without a critic may be under ZeRO 3."""
    one = judged()
    told = {field.name: getattr(one, field.name) for field in fields(one)}
    return Noise(**told | {"model": model, "critic": one.critic if critic else None, "losses": losses or LossConfig()})


def averaged(critic=False):
    """A VQ-VAE whose codes are averages."""
    return task(VQVAEConfig(channels=8, levels=1, blocks=1, quantizer=AVERAGED), critic, LossConfig(distance="l2"))


def judged_averaged():
    """The same with a critic."""
    return averaged(critic=True)


def gumbel():
    """The patches' VQGAN with codes by chance, annealed within the training."""
    quantizer = GumbelConfig(size=16, width=4, anneal_steps=6, warmup_steps=4)
    return task(replace(judged().model, quantizer=quantizer), False, LossConfig(kl=0.1))


def judged_gumbel():
    """The same with a critic, which judges what was drawn."""
    return replace(gumbel(), critic=judged().critic)


def lookup_free():
    """The patches' VQGAN with the signs of its vectors."""
    return task(replace(judged().model, quantizer=LookupFreeConfig(width=4, group=2, temperature=1.0)), False)
