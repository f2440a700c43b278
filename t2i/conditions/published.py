"""Sizes of text encoders that others published and that stay frozen here: of CLIP and of T5.

What loads one is `encoders.py`, from a folder or by a hub's name; this says what it will be, without a file of it.
"""

from dataclasses import dataclass
from typing import Any, Literal

WORDS, PIECES = 49_408, 32_128  # tokens that CLIP and T5 know


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """CLIP's tower for texts, with the projection of the pooled vector where it was published with it."""

    width: int
    layers: int
    heads: int
    projection: int = 0  # numbers of the projected vector of a text; 0: there is none
    length: int = 77  # tokens of a text, at most
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def build(self) -> Any:
        """The model of transformers, with random weights."""
        import transformers  # slow to import: a list of models does without

        sizes = {
            "vocab_size": WORDS,
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "projection_dim": self.projection or self.width,
            "max_position_embeddings": self.length,
            "hidden_act": self.activation,
        }
        kind: Any = transformers.CLIPTextModelWithProjection if self.projection else transformers.CLIPTextModel
        return kind(transformers.CLIPTextConfig(**sizes))


@dataclass(frozen=True, kw_only=True)
class T5EncoderConfig:
    """T5's encoder: `gated` MLPs are those of version 1.1, of which Flan-T5 was tuned."""

    width: int
    layers: int
    heads: int
    inner: int  # width within an MLP
    head_width: int = 64
    gated: bool = True
    length: int = 512  # tokens of a text that it was trained on; it reads any number

    def build(self) -> Any:
        """The model of transformers, with random weights."""
        import transformers

        sizes = {
            "vocab_size": PIECES,
            "d_model": self.width,
            "d_kv": self.head_width,
            "d_ff": self.inner,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "feed_forward_proj": "gated-gelu" if self.gated else "relu",
        }
        model: Any = transformers.T5EncoderModel
        return model(transformers.T5Config(**sizes))


def clip_text_b32() -> CLIPTextConfig:
    """Texts by CLIP ViT-B/32, and by B/16: 63,165,952 parameters.

    arXiv 2103.00020, table 20: openai/clip-vit-base-patch32.
    """
    return CLIPTextConfig(width=512, layers=12, heads=8)


def clip_text_l14() -> CLIPTextConfig:
    """Texts by CLIP ViT-L/14: 123,060,480 parameters.

    arXiv 2103.00020, table 20: openai/clip-vit-large-patch14, of Stable Diffusion 1, XL and 3, and of Flux.
    """
    return CLIPTextConfig(width=768, layers=12, heads=12)


def clip_text_h14() -> CLIPTextConfig:
    """Texts by OpenCLIP ViT-H/14, without the last of its 24 layers: 340,387,840 parameters.

    arXiv 2212.07143: the text encoder that comes with Stable Diffusion 2.
    """
    return CLIPTextConfig(width=1024, layers=23, heads=16, activation="gelu")


def clip_text_bigg14() -> CLIPTextConfig:
    """Texts by OpenCLIP ViT-bigG/14, with its projection: 694,659,840 parameters.

    arXiv 2212.07143: the second text encoder of Stable Diffusion XL and 3.
    """
    return CLIPTextConfig(width=1280, layers=32, heads=20, projection=1280, activation="gelu")


def t5_small() -> T5EncoderConfig:
    """The encoder of T5 small: 35,330,816 parameters.

    arXiv 1910.10683, section 3.7: google-t5/t5-small.
    """
    return T5EncoderConfig(width=512, layers=6, heads=8, inner=2048, gated=False)


def t5_base() -> T5EncoderConfig:
    """The encoder of T5 base: 109,628,544 parameters.

    arXiv 1910.10683, section 3.7: google-t5/t5-base.
    """
    return T5EncoderConfig(width=768, layers=12, heads=12, inner=3072, gated=False)


def t5_large() -> T5EncoderConfig:
    """The encoder of T5 large: 334,939,648 parameters.

    arXiv 1910.10683, section 3.7: google-t5/t5-large.
    """
    return T5EncoderConfig(width=1024, layers=24, heads=16, inner=4096, gated=False)


def t5_3b() -> T5EncoderConfig:
    """The encoder of T5 3B: 1,240,909,824 parameters.

    arXiv 1910.10683, section 3.7: google-t5/t5-3b.
    """
    return T5EncoderConfig(width=1024, layers=24, heads=32, inner=16384, head_width=128, gated=False)


def t5_11b() -> T5EncoderConfig:
    """The encoder of T5 11B: 4,864,791,552 parameters.

    arXiv 1910.10683, section 3.7: google-t5/t5-11b.
    """
    return T5EncoderConfig(width=1024, layers=24, heads=128, inner=65536, head_width=128, gated=False)


def t5_v1_1_small() -> T5EncoderConfig:
    """The encoder of T5 1.1 small: 35,332,800 parameters.

    arXiv 2002.05202: google/t5-v1_1-small, and google/flan-t5-small.
    """
    return T5EncoderConfig(width=512, layers=8, heads=6, inner=1024)


def t5_v1_1_base() -> T5EncoderConfig:
    """The encoder of T5 1.1 base: 109,628,544 parameters.

    arXiv 2002.05202: google/t5-v1_1-base, and google/flan-t5-base.
    """
    return T5EncoderConfig(width=768, layers=12, heads=12, inner=2048)


def t5_v1_1_large() -> T5EncoderConfig:
    """The encoder of T5 1.1 large: 341,231,104 parameters.

    arXiv 2002.05202: google/t5-v1_1-large, and google/flan-t5-large.
    """
    return T5EncoderConfig(width=1024, layers=24, heads=16, inner=2816)


def t5_v1_1_xl() -> T5EncoderConfig:
    """The encoder of T5 1.1 xl: 1,223,527,424 parameters.

    arXiv 2002.05202: google/t5-v1_1-xl, and google/flan-t5-xl.
    """
    return T5EncoderConfig(width=2048, layers=24, heads=32, inner=5120)


def t5_v1_1_xxl() -> T5EncoderConfig:
    """The encoder of T5 1.1 xxl: 4,762,310,656 parameters.

    arXiv 2002.05202: google/t5-v1_1-xxl, and google/flan-t5-xxl. That of Imagen, PixArt, Stable Diffusion 3, Flux.
    """
    return T5EncoderConfig(width=4096, layers=24, heads=64, inner=10240)
