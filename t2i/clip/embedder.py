"""Pictures and texts as unit vectors of a trained CLIP: ours, or one that others published. It judges and scores.

Shapes: B rows, D width of the embeddings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

from t2i.conditions.encoders import CLIP, PRECISIONS, TextEncoderConfig, found_at, quiet, sizes_of, tokens_of
from t2i.pixels import to_pixels

Pictures = Sequence[np.ndarray] | torch.Tensor
"""(H, W, 3) uint8 arrays of any sizes, or (B, 3, H, W) in [-1, 1]."""


class Scores(NamedTuple):
    """Of pictures and their texts."""

    cosines: torch.Tensor  # (B,) in [-1, 1]
    cut: list[bool]  # whether the text is too long, so that its beginning alone was read


class Embedder:
    """A CLIP in the layout of transformers, with its own words and its own way to bring a picture to its square.

    `model` is a folder, local or s3://, or a hub's name. What is said of a row depends on that row alone, up to the
    rounding of the device; `batch` rows are looked at at once. Raises FileNotFoundError or ConnectionError where it
    cannot be had, ValueError where it is no CLIP, or lacks weights.
    """

    def __init__(
        self,
        model: str,
        device: torch.device | str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        batch: int = 64,
    ) -> None:
        import transformers
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

        config = TextEncoderConfig(model=model)
        towers: Any = transformers.CLIPModel
        fits: Any = CLIPImageProcessorPil
        with found_at(model, "CLIP") as (name, folder):
            kind = transformers.AutoConfig.from_pretrained(name, **folder, trust_remote_code=False).model_type
            if kind != CLIP:
                raise ValueError(f"{model} holds a model of type '{kind}', but pictures and texts are judged by CLIP.")
            with quiet():
                loaded, report = towers.from_pretrained(
                    name, **folder, dtype=PRECISIONS[precision], output_loading_info=True
                )
            self._fit = fits.from_pretrained(name, **folder)
        if missing := report["missing_keys"]:
            raise ValueError(f"{model} lacks {len(missing)} weights of CLIP, such as {min(missing)}.")
        self._model: Any = loaded.to(device).eval().requires_grad_(False)
        self._tokens, self._batch = tokens_of(config), batch
        self.width: int = self._model.config.projection_dim
        self.longest = sizes_of(config).length  # tokens of a text that are read, 77 of those published

    def to(self, device: torch.device | str) -> "Embedder":
        """Itself, on a device."""
        self._model.to(device)
        return self

    def embed_images(self, pictures: Pictures) -> torch.Tensor:
        """(B, D) fp32 of length 1."""
        arrays = to_pixels(pictures) if isinstance(pictures, torch.Tensor) else pictures
        return self._embed(arrays, self._pictures)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, D) fp32 of length 1; of a text that is too long (`cut`), its beginning."""
        return self._embed(texts, self._texts)

    def features(self, pictures: Pictures) -> np.ndarray:
        """(B, D) float64 for distances: embeddings of mean square 1, as an extractor of ours has its features.

        By length 1 the kernel of KID, (x·y / D + 1)³, would be as good as linear.
        """
        return self.embed_images(pictures).double().cpu().numpy() * np.sqrt(self.width)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Of which texts the end is not read."""
        return [count > self.longest for count in self._tokens.counts(texts)]

    def score(self, pictures: Pictures, texts: Sequence[str]) -> Scores:
        """The cosine of each picture and its text; ValueError where there are not as many of one as of the other."""
        if len(pictures) != len(texts):
            raise ValueError(
                f"Each picture has its text, but there are {len(pictures)} pictures and {len(texts)} texts."
            )
        return Scores((self.embed_images(pictures) * self.embed_texts(texts)).sum(1), self.cut(texts))

    def judge(self, values: torch.Tensor, pictures: torch.Tensor | None, told: Mapping[str, list]) -> torch.Tensor:
        """(B,) cosines of pictures and the captions that were told: a `Judge` of a chain, on the device of `values`."""
        if pictures is None:
            raise ValueError("CLIP judges pictures, but nothing decodes the values of this link: judge a later one.")
        if "caption" not in told:
            raise ValueError("CLIP judges a picture by its caption, but no caption was told.")
        return self.score(pictures, told["caption"]).cosines.to(values.device)

    @torch.no_grad()
    def _embed(self, rows: Sequence[Any], embed: Callable[[Sequence[Any]], torch.Tensor]) -> torch.Tensor:
        found = [torch.empty(0, self.width, device=self._model.device)]
        for start in range(0, len(rows), self._batch):
            found.append(normalize(embed(rows[start : start + self._batch]).float(), dim=-1))
        return torch.cat(found)

    def _pictures(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        fit = self._fit(images=list(pictures), input_data_format="channels_last", return_tensors="pt")
        values = fit["pixel_values"].to(self._model.device, self._model.dtype)
        return self._model.get_image_features(values).pooler_output

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        ids, _ = self._tokens(texts)
        return self._model.get_text_features(torch.from_numpy(ids).to(self._model.device)).pooler_output
