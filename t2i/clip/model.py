"""CLIP (arXiv 2103.00020): a tower for pictures and one for texts, whose unit vectors meet in one space.

The towers are transformers' `CLIPModel`. Shapes: B rows, T tokens, D width of the embeddings.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.functional import normalize

from t2i.clip.contrast import LIMIT, contrast, leash
from t2i.clip.fit import MEAN, STD, Fit
from t2i.nn.weights import begins, constant, normal
from t2i.partners import Gather, alone, seen
from t2i.protocol import Batch, Turn

if TYPE_CHECKING:
    import transformers

TEMPERATURE = 0.07  # of the cosines at first; it is learned
LEAST_WORDS = 2 * 256 + 2  # a byte, a byte that ends a word, and what opens and closes a text


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A transformer whose MLPs are four times as wide as it is."""

    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"A tower has a width that its heads divide, and at least one layer, but width is {self.width}, heads "
                f"{self.heads}, layers {self.layers}."
            )


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The sizes of both towers; by themselves those of ViT-B/32."""

    vision: TowerConfig = field(default_factory=lambda: TowerConfig(width=768, layers=12, heads=12))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(width=512, layers=12, heads=8))
    width: int = 512  # of the space in which both are compared
    image_size: int = 224  # pixels a side of what the picture tower sees
    patch: int = 32
    fit: Fit = "crop"  # how a picture comes to that square: its middle, as CLIP has it, or all of it, stretched
    length: int = 77  # tokens of a text, at most, with those that open and close it
    vocabulary_size: int = 49_408  # at most; of a trained CLIP, as many as there are
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_size < self.patch or self.image_size % self.patch:
            raise ValueError(f"A picture of {self.image_size} pixels does not divide into patches of {self.patch}.")
        if self.width < 1 or self.length < 3:
            raise ValueError(
                f"CLIP needs a width of at least 1 and texts of at least 3 tokens; found {self.width}, {self.length}."
            )
        if self.vocabulary_size < LEAST_WORDS:
            raise ValueError(
                f"A vocabulary of {self.vocabulary_size} is too small: all bytes and the ends of a text are "
                f"{LEAST_WORDS}."
            )

    def build(self) -> "CLIP":
        """A CLIP whose weights are still to be filled."""
        return CLIP(self)


def clip_b32() -> CLIPConfig:
    """ViT-B/32: 151,277,313 parameters.

    arXiv 2103.00020, table 20.
    """
    return CLIPConfig()


def clip_b16() -> CLIPConfig:
    """ViT-B/16: 149,620,737 parameters.

    arXiv 2103.00020, table 20.
    """
    return CLIPConfig(patch=16)


def clip_l14() -> CLIPConfig:
    """ViT-L/14: 427,616,513 parameters.

    arXiv 2103.00020, table 20.
    """
    return CLIPConfig(
        vision=TowerConfig(width=1024, layers=24, heads=16),
        text=TowerConfig(width=768, layers=12, heads=12),
        width=768,
        patch=14,
    )


def clip_l14_336() -> CLIPConfig:
    """ViT-L/14 at 336 pixels: 427,944,193 parameters.

    arXiv 2103.00020, table 20.
    """
    large = clip_l14()
    return CLIPConfig(vision=large.vision, text=large.text, width=large.width, patch=large.patch, image_size=336)


def clip_shapes() -> CLIPConfig:
    """One for the scenes of Shapes at 32 pixels: 1,341,825 parameters.

    Of this project: no paper has it. Its texts hold 640 tokens.
    """
    return CLIPConfig(
        vision=TowerConfig(width=128, layers=3, heads=4),
        text=TowerConfig(width=128, layers=3, heads=4),
        width=128,
        image_size=32,
        patch=8,
        vocabulary_size=640,
    )


class CLIP(nn.Module):
    """Pictures and texts that belong together lie close; it learns from every pair of the global batch.

    A batch has `pixels` (B, 3, S, S) uint8, `ids` (B, T) int64, padded at the end, and `text` (B,) int64, which is
    equal where texts are.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.clip: Any = build(config)
        self.gather: Gather = alone  # the task gives the loop's
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def turns(self) -> list[Turn]:
        """Its own, alone."""
        return [Turn("clip", self, mixes_rows=True)]

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Rows: each has a picture that finds its text, and a text that finds its picture."""
        return {"contrastive": batch["weight"].sum()}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of the batch's rows against those of the global batch; or what rows show ("survey")."""
        shown = {
            "weight": batch["weight"],
            "image": self.images(batch["pixels"]),
            "words": self.texts(batch["ids"]),
            "text": batch["text"],
        }
        if "survey" in batch:
            return shown
        every, there = seen(batch, shown, self.gather), batch["weight"] > 0
        scale = self.clip.logit_scale[0]
        with torch.autocast(there.device.type, enabled=False):  # a cosine over a small temperature wants all bits
            loss = contrast(
                shown["image"][there], shown["words"][there], every["image"], every["words"], every["text"],
                int(every["first"]), scale.float().clamp(max=LIMIT).exp(),
            )  # fmt: skip
            return {"contrastive": loss + leash(scale) * there.sum()}

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, D), fp32, of (B, 3, S, S) uint8."""
        values = (pixels.float() / 255 - self.mean) / self.std
        return normalize(self.clip.get_image_features(values).pooler_output.float(), dim=-1)

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, D), fp32: the state of the first token that closes a text; it sees none of those after."""
        return normalize(self.clip.get_text_features(ids).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def published(self) -> "transformers.CLIPModel":
        """The towers as they are published: with a scale that is no more than 100, and no vector."""
        self.clip.logit_scale = nn.Parameter(self.clip.logit_scale.reshape(()).clamp(max=LIMIT))
        return self.clip


def build(config: CLIPConfig) -> "transformers.CLIPModel":
    """The towers; their first weights are still to be filled, after OpenAI's code, for both alike."""
    import transformers  # slow to import: `plan` does without
    from transformers.initialization import no_init_weights

    end = config.vocabulary_size - 1  # the last two tokens open and close a text
    told = transformers.CLIPConfig(
        text_config={
            **_sizes(config.text, config),
            "vocab_size": config.vocabulary_size,
            "max_position_embeddings": config.length,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={**_sizes(config.vision, config), "image_size": config.image_size, "patch_size": config.patch},
        projection_dim=config.width,
        logit_scale_init_value=math.log(1 / TEMPERATURE),
    )
    with no_init_weights():
        model: Any = transformers.CLIPModel(told)
    model.logit_scale = nn.Parameter(model.logit_scale.reshape(1))  # DeepSpeed spreads nothing that has no axis
    begins(model, logit_scale=constant(math.log(1 / TEMPERATURE)))
    begins(model.text_model.embeddings.token_embedding, weight=normal(0.02))
    begins(model.text_model.embeddings.position_embedding, weight=normal(0.01))
    std = config.vision.width**-0.5
    begins(model.vision_model.embeddings, class_embedding=normal(std))
    begins(model.vision_model.embeddings.position_embedding, weight=normal(std))
    begins(model.visual_projection, weight=normal(std))
    begins(model.text_projection, weight=normal(config.text.width**-0.5))
    for tower, sizes in ((model.vision_model, config.vision), (model.text_model, config.text)):
        for layer in tower.encoder.layers:
            _begin(layer, sizes)
    return model


def _sizes(tower: TowerConfig, config: CLIPConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": config.activation,
        "projection_dim": config.width,
    }


def _begin(layer: Any, sizes: TowerConfig) -> None:
    """What adds to the residual begins smaller, by the number of its additions."""
    std, adding = sizes.width**-0.5, sizes.width**-0.5 * (2 * sizes.layers) ** -0.5
    attention = layer.self_attn
    stds = {attention.q_proj: std, attention.k_proj: std, attention.v_proj: std, attention.out_proj: adding}
    stds |= {layer.mlp.fc1: (2 * sizes.width) ** -0.5, layer.mlp.fc2: adding}
    for part, its in stds.items():
        begins(part, weight=normal(its), bias=constant(0.0))
