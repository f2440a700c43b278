"""Small captioners with loud weights: an error of padding or position changes their words."""

import pytest
import torch

from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.vocabulary import train_vocabulary

CAPTIONS = [
    "a large red circle at the top left",
    "a small blue square at the bottom right, on a white background",
    "two green triangles and a yellow cross",
    "IMG_1234.jpg",
]


@pytest.fixture(scope="session")
def vocabulary():
    return train_vocabulary(CAPTIONS * 3, 300)


@pytest.fixture
def make_captioner(vocabulary):
    def make(image_size=(16, 24), decoders=("alt",), layers=2, hidden=64):
        config = CaptionerConfig(
            vision=VisionConfig(image_size=image_size, patch_size=8, hidden=hidden, layers=layers, heads=4, mlp=128),
            text=TextConfig(hidden=hidden, layers=layers, heads=4, mlp=128, max_length=24),
            init_std=0.4,
        )
        torch.manual_seed(0)
        return Captioner(config.blip(vocabulary), vocabulary, decoders).eval()

    return make


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (14, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
