"""Captioning as a stage: pictures in, a caption and its log-probability in each style out."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from captioner.decoding import caption, decoder_of, score
from captioner.images import fit_images
from captioner.model import BASE, Captioner
from captioner.styles import Style
from captioner.task import ALT_COLUMN, load_captioner


@dataclass
class Caption:
    """Encodes each image once, speaks of it in every style, and scores the caption that came with it.

    Writes `caption_<style>` and `logp_<style>` for each style, and `logp_alt`: mean log-probabilities a token, <= 0.
    """

    captioner: str
    styles: tuple[Style, ...]
    precision: Literal["fp32", "bf16"] = "fp32"
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(default=("pixels", ALT_COLUMN), init=False)
    writes: tuple[str, ...] = field(init=False)
    _model: Captioner | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        columns = [f"{kind}_{style.name}" for style in self.styles for kind in ("caption", "logp")]
        self.writes = (*columns, f"logp_{BASE}")

    def setup(self) -> None:
        """Load the captioner; ValueError if a style asks for a decoder that it lacks."""
        kind = torch.bfloat16 if self.precision == "bf16" else torch.float32
        model = load_captioner(self.captioner).to("cuda" if self.gpus else "cpu", kind).eval()
        for style in self.styles:
            decoder_of(model, style)
        self._model = model

    @torch.no_grad()
    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Captions of all styles from one encoding."""
        assert self._model is not None, "setup comes first"
        pixels = torch.from_numpy(fit_images(batch["pixels"], self._model.image_size))
        features = self._model.encode(pixels.to("cuda" if self.gpus else "cpu"))
        columns: dict[str, list] = {f"logp_{BASE}": score(self._model, features, batch[ALT_COLUMN], Style(name=BASE))}
        for style in self.styles:
            captions = caption(self._model, features, style)
            columns |= {f"caption_{style.name}": captions.texts, f"logp_{style.name}": captions.logp}
        return columns
