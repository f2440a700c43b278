"""Encoding as a stage: pictures in, codes out."""

from dataclasses import dataclass, field

import numpy as np
import torch

from t2i.tokenizers.losses import scale
from t2i.tokenizers.task import load_tokenizer


@dataclass
class Encode:
    """Writes codes, a list of int32 in raster order, of each image into a column."""

    tokenizer: str
    cpus: float = 1
    gpus: float = 0
    column: str = "codes"
    reads: tuple[str, ...] = field(default=("pixels",), init=False)
    writes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.writes = (self.column,)

    def setup(self) -> None:
        """Load the tokenizer."""
        self._device = "cuda" if self.gpus else "cpu"
        self._model = load_tokenizer(self.tokenizer).to(self._device)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Codes of a batch of images; those of one size are encoded together."""
        codes: list = [None] * len(batch["pixels"])
        for shape in dict.fromkeys(image.shape for image in batch["pixels"]):
            places = [place for place, image in enumerate(batch["pixels"]) if image.shape == shape]
            images = torch.from_numpy(np.stack([batch["pixels"][place] for place in places])).permute(0, 3, 1, 2)
            found = self._model.encode(scale(images.to(self._device))).flatten(1).int().cpu().numpy()
            for place, row in zip(places, found, strict=True):
                codes[place] = row
        return {self.column: codes}
