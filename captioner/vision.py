"""BLIP's vision transformer: towers that are not square, attention in one kernel, and pictures a few at a time."""

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    import transformers

# Patches enter with a spread near 1: where positions were much fainter, a third of a short training went by unplaced.
_POSITION_STD = 0.5
_CACHED = 2**21  # numbers; of BLIP-base at 384 pixels four pictures


def see(tower: Any, images: Tensor) -> Tensor:
    """Features (B, 1 + patches, hidden) of normalised images (B, 3, H, W) by a BlipVisionModel.

    The same as its own forward pass, which writes out the attention of every patch to every other: on a CPU in bf16
    that takes 1.3 times as long.
    """
    hidden = tower.embeddings(images)
    for layer in tower.encoder.layers:
        recomputed = getattr(layer, "recomputed", None)  # where a training keeps its input alone
        hidden = _pass(layer, hidden) if recomputed is None else recomputed(_pass, layer, hidden)
    return tower.post_layernorm(hidden)


def _pass(layer: Any, hidden: Tensor) -> Tensor:
    hidden = hidden + _attend(layer.self_attn, layer.layer_norm1(hidden))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def _attend(attention: Any, hidden: Tensor) -> Tensor:
    queries, keys, values = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    seen = scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
    return attention.projection(seen.transpose(1, 2).flatten(2))


def portion(rows: Tensor) -> int:
    """How many pictures, or their features, are best worked on at once: as many as a CPU's cache holds, all on a GPU.

    Of BLIP-base at 384 pixels, 32 at once take 1.4 times as long a picture as 8 do on two cores.
    """
    return max(1, len(rows) if rows.is_cuda else _CACHED // rows.shape[1:].numel())


def build_tower(config: "transformers.BlipVisionConfig") -> "transformers.BlipVisionModel":
    """A new tower for images of a configuration's `image_size`, one side or (height, width)."""
    from transformers import BlipVisionModel  # slow to import: `plan` does without

    size = config.image_size
    if isinstance(size, int):
        return BlipVisionModel(config)
    square = copy.deepcopy(config)
    square.image_size = max(size)  # transformers builds towers for squares alone ...
    made = BlipVisionModel(square)
    patch = cast(int, config.patch_size)
    rows, columns = (side // patch for side in size)
    positions = torch.empty(1, 1 + rows * columns, config.hidden_size)
    nn.init.trunc_normal_(positions, std=_POSITION_STD)
    # ... but only its position embedding knows the grid: one vector a patch in raster order, after the class token's.
    made.embeddings.position_embedding = nn.Parameter(positions)
    return made
