"""CLIP (arXiv 2103.00020) as published: the cosine of an image and a text, and whether the text was cut to be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from captioner.hub import asked


@dataclass(frozen=True)
class Similarities:
    """Of each row: the cosine in [-1, 1], and whether it is that of the text's beginning alone; None without text."""

    values: list[float | None]
    cut: list[bool | None]


class Clip:
    """A `CLIPModel` in the Hugging Face layout, by a hub's name or a folder, with its own fit of pixels.

    Raises what `asked` does where it cannot be had, ValueError where it is not CLIP.
    """

    def __init__(self, name: str, device: str = "cpu", kind: torch.dtype = torch.float32) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPModel  # slow to import: `plan` does without
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

        with asked(name, "CLIP"):
            model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
            if model_type != "clip":
                raise ValueError(f"{name} holds a model of type '{model_type}', but similarity is asked of CLIP only.")
            model: Any = CLIPModel.from_pretrained(name)
            self._fit: Any = CLIPImageProcessorPil.from_pretrained(name)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self._model = model.to(device, kind).eval()
        self.longest = int(self._model.config.text_config.max_position_embeddings)  # 77 tokens, with first and last

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray]) -> Tensor:
        """Unit vectors (B, width) in fp32 of (H, W, 3) uint8 images, resized and cropped to their middle."""
        pixels = self._fit(images=list(images), return_tensors="pt")["pixel_values"].to(self._device, self._model.dtype)
        return normalize(self._model.get_image_features(pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def similarity(self, images: Tensor, texts: Sequence[str | None]) -> Similarities:
        """Of `images` (B, width) of `encode` and the text of each row; the end of a long text goes unread."""
        rows = [row for row, text in enumerate(texts) if text is not None]
        values: list[float | None] = [None] * len(texts)
        cut: list[bool | None] = [None] * len(texts)
        if rows:
            given = [texts[row] for row in rows]
            lengths = [len(ids) for ids in self._tokenizer(given)["input_ids"]]
            read = self._tokenizer(
                given, truncation=True, max_length=self.longest, padding=True, return_tensors="pt"
            ).to(self._device)
            vectors = normalize(self._model.get_text_features(**read).pooler_output.float(), dim=-1)
            cosines = (images[rows] * vectors).sum(1).tolist()
            for row, cosine, length in zip(rows, cosines, lengths, strict=True):
                values[row], cut[row] = cosine, length > self.longest
        return Similarities(values, cut)

    @property
    def _device(self) -> torch.device:
        return self._model.device
