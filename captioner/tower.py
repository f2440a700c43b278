"""A captioner within an actor: stages that share it load it once, and its tower sees a picture once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from captioner.images import fit_image, fit_images
from captioner.model import Captioner
from captioner.task import load_tower


@dataclass
class Tower:
    """The captioner or retrieval weights at `source`, and the features of the pictures that were asked for last.

    Give one Tower to several stages of one actor: whichever runs first encodes, the others find what it did.
    """

    source: str
    precision: Literal["fp32", "bf16"] = "fp32"
    gpus: float = 0
    _model: Captioner | None = field(default=None, init=False, repr=False)
    _pictures: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    _features: Tensor | None = field(default=None, init=False, repr=False)

    def setup(self) -> None:
        """Load the model, if no stage has yet."""
        if self._model is None:
            kind = torch.bfloat16 if self.precision == "bf16" else torch.float32
            self._model = load_tower(self.source).to("cuda" if self.gpus else "cpu", kind).eval()

    @property
    def view(self) -> str:
        """The column of pictures as this tower sees them, made ready while they are decoded."""
        return f"as seen by {self.source}"

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """A picture (H, W, 3) uint8 in the size that the model takes."""
        return fit_image(pixels, self.model.image_size)

    @property
    def model(self) -> Captioner:
        """The captioner, once `setup` was called."""
        assert self._model is not None, "setup comes first"
        return self._model

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features (B, N, D) of (H, W, 3) uint8 pictures, those of any other size than the model's stretched to it.

        Pictures are known again as the objects that they are: stages of one actor are given the same arrays, of rows
        that were not rejected on the way.
        """
        places = {id(picture): place for place, picture in enumerate(self._pictures)}
        if self._features is None or any(id(picture) not in places for picture in pictures):
            fitted = torch.from_numpy(fit_images(pictures, self.model.image_size))
            self._features = self.model.encode(fitted.to("cuda" if self.gpus else "cpu"))
            self._pictures = list(pictures)  # held, so that no other array takes their identity
            return self._features
        rows = [places[id(picture)] for picture in pictures]
        return self._features if rows == list(range(len(self._pictures))) else self._features[rows]

    def sees_as(self, other: "Tower") -> bool:
        """Whether the two models' towers are one and the same, weight by weight."""
        ours, theirs = self.model.vision.state_dict(), other.model.vision.state_dict()
        return (
            self.model.image_size == other.model.image_size
            and ours.keys() == theirs.keys()
            and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
        )
