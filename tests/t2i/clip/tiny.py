"""A tiny CLIP of two-coloured pictures and what is said of them; a task for the workers of `tests.infra.train.toy`."""

import functools
import tempfile

import numpy as np

from infra.train.optim import OptimConfig
from t2i.clip.model import CLIPConfig, TowerConfig
from t2i.clip.task import ClipTask
from t2i.clip.words import CLIPWords, train_words

COLORS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
LENGTH, SIDE = 10, 16
TOWER = TowerConfig(width=32, layers=1, heads=2)


def caption(row, style="short"):
    above, below = (list(COLORS)[number] for number in (row % 4, row // 4 % 4))
    return f"{above} over {below}" if style == "short" else f"A picture: {below.upper()} under {above}"


def picture(row, size=None):
    """(H, W, 3) uint8, noisy; of several ratios."""
    height, width = size or (SIDE + 4 * (row % 2), SIDE + 4 * (row % 3))
    rgb = list(COLORS.values())
    pixels = np.empty((height, width, 3))
    pixels[: height // 2], pixels[height // 2 :] = rgb[row % 4], rgb[row // 4 % 4]
    noise = np.random.default_rng(row).normal(0, 10, pixels.shape)
    return (pixels + noise).clip(0, 255).astype(np.uint8)


@functools.cache
def words():
    """The folder of a vocabulary, of this process."""
    folder = tempfile.mkdtemp(prefix="clip-words-")
    train_words([caption(row, style) for row in range(64) for style in ("short", "long")], 560, LENGTH, folder)
    return folder


class Rows(ClipTask):
    """The picture and captions of a row are made of its number; sixteen are told apart."""

    rows = 64

    def collate(self, rows, draw):
        numbers = rows["row"]
        told = {f"caption_{style}": [caption(row, style) for row in numbers] for style in self.styles}
        told |= {f"weight_{style}": [0.5] * len(numbers) for style in self.styles}
        return super().collate({"pixels": [picture(row) for row in numbers], **told}, draw)


def config(**changes):
    sizes = {"vision": TOWER, "text": TOWER, "width": 16, "image_size": SIDE, "patch": 8, "length": LENGTH}
    return CLIPConfig(**{**sizes, "vocabulary_size": len(CLIPWords(words(), LENGTH)), **changes})


def task(**optim):
    told = {"lr": 3e-3, "warmup_steps": 3, "weight_decay": 0.1, "ema_decay": 0.9, **optim}
    return Rows(model=config(), words=words(), styles=("long", "short"), optim=OptimConfig(**told), seed=1)
