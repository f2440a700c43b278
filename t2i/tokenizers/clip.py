"""The embedding of a picture by a frozen CLIP as a tokenizer: a prior can draw it (DALL-E 2, arXiv 2204.06125)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from t2i.protocol import Space
from t2i.tokenizers.scale import Scale


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP by its artifact's or another folder, local or s3://, or by a hub's name. It stays where it is."""

    path: str

    def build(self) -> "ClipEmbedding":
        """The tokenizer; FileNotFoundError, ConnectionError or ValueError where there is no such CLIP."""
        return ClipEmbedding(self)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """One embedding, of images of every size."""
        return 1, 1


class ClipEmbedding(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to embeddings (B, D), of length 1 before they are scaled.

    CLIP brings a picture to its square by itself. There is no way back but a prior that is told embeddings.
    """

    decodes = False
    learns = False  # what it is made of was trained elsewhere
    scale: Scale | None = None

    def __init__(self, config: ClipConfig) -> None:
        from t2i.clip.embedder import Embedder  # slow to import, and seldom wanted

        super().__init__()
        self.config = config
        self._embedder = Embedder(config.path)  # no part of this module: whoever saves it saves no CLIP

    def _apply(self, *arguments: Any, **options: Any) -> "ClipEmbedding":
        """Take the CLIP along to another device."""
        super()._apply(*arguments, **options)
        place = arguments[0](torch.empty(0)).device
        if place.type != "meta":
            self._embedder.to(place)
        return self

    def space(self, size: tuple[int, int]) -> Space:
        """(D,), whatever the size of images."""
        return Space((self._embedder.width,))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D), scaled."""
        return self.latents(images)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """The same."""
        embeddings = self._embedder.embed_images(images)
        return self.scale.to(embeddings) if self.scale is not None else embeddings

    def decode(self, values: torch.Tensor) -> torch.Tensor:
        """ValueError: it does not decode."""
        raise ValueError("An embedding of CLIP does not decode: draw with a prior that hears embeddings.")
