"""BLIP (arXiv 2201.12086) with one vision tower and a text decoder for every style of caption."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from captioner.hub import asked
from captioner.matching import Matching, MatchingConfig
from captioner.styles import Style
from captioner.vision import build_tower, portion, see
from captioner.vocabulary import Vocabulary, blank

if TYPE_CHECKING:
    import transformers

# The statistics of CLIP's training images, with which BLIP was trained (as transformers' BlipImageProcessor).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG = "config.json"
BASE = "alt"  # the decoder trained on the corpus's own captions; styles without a decoder of their own use it


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer over the patches of an H by W image."""

    image_size: tuple[int, int] = (32, 32)  # (height, width); images of another size are stretched to it, as BLIP does
    patch_size: int = 8
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    mlp: int = 384

    def __post_init__(self) -> None:
        if any(side < self.patch_size or side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image_size must be whole patches of {self.patch_size} pixels a side, but it is {self.image_size}."
            )
        if self.hidden % self.heads:
            raise ValueError(f"The vision tower's width {self.hidden} does not divide into {self.heads} heads.")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A causal text decoder that attends to the vision tower's patches."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    mlp: int = 384
    max_length: int = 64  # tokens, with [DEC], the prompt and [SEP]

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"The text decoder's width {self.hidden} does not divide into {self.heads} heads.")
        if self.max_length < 4:
            raise ValueError(f"max_length must leave room for a caption, but it is {self.max_length} tokens.")


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """The size of a captioner trained from scratch."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    # Standard deviation of the first weights. BLIP's 0.02 is for a width of 768; narrow models learn faster from more.
    init_std: float = 0.06

    def __post_init__(self) -> None:
        if not self.init_std > 0:
            raise ValueError(f"init_std must be positive, but it is {self.init_std}.")

    def blip(self, vocabulary: Vocabulary) -> "transformers.BlipConfig":
        """The same in the words of transformers, for a given vocabulary."""
        from transformers import BlipConfig  # slow to import, here and below: `plan` does without

        vision, text = self.vision, self.text
        return BlipConfig(
            vision_config={
                "image_size": list(vision.image_size),
                "patch_size": vision.patch_size,
                "hidden_size": vision.hidden,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
                "intermediate_size": vision.mlp,
                "initializer_range": self.init_std,
            },
            text_config={
                "vocab_size": len(vocabulary),
                "hidden_size": text.hidden,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "intermediate_size": text.mlp,
                "max_position_embeddings": text.max_length,
                "initializer_range": self.init_std,
                "bos_token_id": vocabulary.bos,
                "sep_token_id": vocabulary.sep,
                "eos_token_id": vocabulary.sep,
                "pad_token_id": vocabulary.pad,
            },
        )

    def build(self, vocabulary: Vocabulary) -> "Captioner":
        """A captioner of this size, with the base's decoder alone."""
        return Captioner(self.blip(vocabulary), vocabulary)


def blip_base() -> tuple[CaptionerConfig, Vocabulary]:
    """BLIP with ViT-B/16 at 384 pixels, which captions: 223,971,644 parameters.

    arXiv 2201.12086; its sizes are those of the published weights, Salesforce/blip-image-captioning-base. The file of
    these weights holds 23,442,432 numbers more: the words' embedding, which is the last layer, too, lies in it twice.
    """
    return _published(768, 12, 12)


def blip_large() -> tuple[CaptionerConfig, Vocabulary]:
    """BLIP with ViT-L/16 at 384 pixels, which captions: 446,290,492 parameters.

    arXiv 2201.12086; its sizes are those of the published weights, Salesforce/blip-image-captioning-large.
    """
    return _published(1024, 24, 16)


def _published(width: int, layers: int, heads: int) -> tuple[CaptionerConfig, Vocabulary]:
    vision = VisionConfig(image_size=(384, 384), patch_size=16, hidden=width, layers=layers, heads=heads, mlp=4 * width)
    text = TextConfig(hidden=768, layers=12, heads=12, mlp=3072, max_length=512)
    words = blank(30_524)  # BERT's in lower case, [DEC] and [ENC]
    return CaptionerConfig(vision=vision, text=text, init_std=0.02), words


@dataclass(frozen=True)
class About:
    """What a saved captioner says of itself, without its weights."""

    decoders: tuple[str, ...]
    styles: tuple[Style, ...]  # those that it was tuned for
    matching: MatchingConfig | None

    @staticmethod
    def of(config: Mapping[str, Any]) -> "About":
        """From the content of its `config.json`."""
        styles = tuple(Style(**style) for style in config["styles"])
        matching = MatchingConfig(**config["matching"]) if config.get("matching") else None
        return About(tuple(config["decoders"]), styles, matching)


class Captioner(nn.Module):
    """One vision tower, a decoder for each name in `decoders`, and `matching`; all read one encoding of an image.

    A batch for training holds `pixels` (B, H, W, 3) uint8, `weight` (B,) and, for each style, `ids_<style>` (B, L)
    integers that open with [DEC] and the prompt, and `mask_<style>` (B, L): 1 where a token is to be predicted.
    Padding stands on the right, where causal attention cannot see it from the caption; so no attention mask is needed.
    With `draw_text` and `draw_image` (B,), uniforms in [0, 1), the base's captions are learned to be matched, too.
    """

    def __init__(
        self,
        config: "transformers.BlipConfig",
        vocabulary: Vocabulary,
        decoders: Iterable[str] = (BASE,),
        styles: tuple[Style, ...] = (),
        matching: MatchingConfig | None = None,
    ) -> None:
        from transformers import BlipTextLMHeadModel

        super().__init__()
        self.config, self.vocabulary, self.styles = config, vocabulary, styles
        self._vision_config = cast("transformers.BlipVisionConfig", config.vision_config)
        self._text_config = cast("transformers.BlipTextConfig", config.text_config)
        self.vision = build_tower(self._vision_config)
        self.decoders = nn.ModuleDict({name: BlipTextLMHeadModel(self._text_config) for name in decoders})
        self.matching = Matching(config, matching, vocabulary) if matching else None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that `encode` takes."""
        size = self._vision_config.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def max_length(self) -> int:
        """The longest sequence of a decoder in tokens, with [DEC], the prompt and [SEP]."""
        return self._text_config.max_position_embeddings

    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, 1 + patches, hidden) of `pixels` (B, H, W, 3) uint8 in the tower's own image size."""
        assert pixels.dtype == torch.uint8, pixels.dtype
        assert tuple(pixels.shape[1:]) == (*self.image_size, 3), pixels.shape
        mean, std = torch.tensor(MEAN, device=pixels.device), torch.tensor(STD, device=pixels.device)
        images = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        weight = self.vision.embeddings.patch_embedding.weight
        images = images.to(weight.dtype)
        if torch.is_grad_enabled() and weight.requires_grad:
            return see(self.vision, images)
        with torch.no_grad():
            return torch.cat([see(self.vision, part) for part in images.split(portion(images))])

    def logits(self, decoder: str, features: Tensor, ids: Tensor) -> Tensor:
        """Next-token logits (B, L, vocabulary) in fp32 for `ids` (B, L), padded on the right if at all."""
        return self.decoders[decoder](ids, encoder_hidden_states=features, use_cache=False).logits.float()

    def negative_log_likelihood(self, decoder: str, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The summed -log p of the tokens of `ids` where `mask` is not 0, a row: (B,) in fp32; no label smoothing."""
        length = max(2, int((mask > 0).any(0).nonzero().max()) + 1) if bool(mask.any()) else 2
        ids, mask = (
            ids[:, :length].long(),
            mask[:, :length],
        )  # columns that are padding in every row cost time for nothing
        logits = self.logits(decoder, features, ids[:, :-1])
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * mask[:, 1:]).sum(1)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The summed loss of each style in the batch, over caption tokens alone: prompts and padding are masked.

        Then those of `matching`. A batch that is a "survey" only shows what its rows have for the others to see.
        """
        features = self.encode(batch["pixels"])
        matched = {}
        if self.matching is not None and "draw_text" in batch:
            batch = {**batch, "ids": batch[f"ids_{BASE}"]}
            if "survey" in batch:
                return self.matching.survey(features, batch)
            matched = self.matching(features, batch)
        return matched | {
            style: (
                self.negative_log_likelihood(style, features, batch[f"ids_{style}"], batch[f"mask_{style}"])
                * batch["weight"]
            ).sum()
            for style in self.decoders
            if f"ids_{style}" in batch
        }

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many tokens, or rows, each of `forward`'s sums runs over."""
        matched = self.matching.config.losses if self.matching is not None and "draw_text" in batch else ()
        rows = {name: batch["weight"].sum() for name in matched}
        return rows | {
            style: (batch[f"mask_{style}"][:, 1:].float().sum(1) * batch["weight"]).sum()
            for style in self.decoders
            if f"ids_{style}" in batch
        }

    def branch(self, styles: Iterable[str], source: str = BASE) -> None:
        """Add a decoder for each style, a copy of `source`, and leave only these trainable (as DALL-E 3 fine-tunes)."""
        self.requires_grad_(False)
        for style in styles:
            self.decoders[style] = copy.deepcopy(self.decoders[source]).requires_grad_(True)

    def save(self, folder: str) -> None:
        """Write `model.safetensors`, `config.json`, `tokenizer.json` and `vocab.txt` into a local folder."""
        save_file(_untied(self), str(Path(folder, "model.safetensors")))
        self.vocabulary.save(folder)
        config = {
            "blip": self.config.to_dict(),
            "decoders": list(self.decoders),
            "styles": [asdict(style) for style in self.styles],
            "matching": asdict(self.matching.config) if self.matching is not None else None,
        }
        Path(folder, CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False))

    @staticmethod
    def load(folder: str) -> "Captioner":
        """A captioner from a folder that `save` wrote, or from published BLIP weights in the Hugging Face layout."""
        from transformers import BlipConfig
        from transformers.initialization import no_init_weights

        path = Path(folder, CONFIG)
        if not path.is_file() or "blip" not in json.loads(path.read_bytes()):
            return from_pretrained(folder)
        config = json.loads(path.read_bytes())
        about = About.of(config)
        blip = BlipConfig.from_dict(config["blip"])
        vocabulary = Vocabulary.load(folder, config["blip"]["text_config"]["bos_token_id"])
        with no_init_weights():  # to draw what is written over takes as long as all the rest
            captioner = Captioner(blip, vocabulary, about.decoders, about.styles, about.matching)
        for decoder in captioner.decoders.values():
            cast(Any, decoder).tie_weights()  # left out together with the draw
        load_model(captioner, str(Path(folder, "model.safetensors")))
        return captioner.eval()


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """Each weight once, by the first of its names: the same bytes whenever the same weights are saved.

    safetensors' own `save_model` also notes the names it leaves out, in an order that changes from process to process.
    """
    kept: dict[tuple[int, int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in sorted(module.state_dict().items()):
        kept.setdefault((tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape), (name, tensor))
    return {name: tensor.contiguous() for name, tensor in kept.values()}


def from_pretrained(name: str) -> Captioner:
    """Published BLIP weights, by a hub's name or a folder in the Hugging Face layout.

    A captioning checkpoint's decoder becomes "alt". A retrieval checkpoint's head and projections become `matching`,
    and there is no decoder. Raises what `asked` does where it cannot be had, ValueError where it is not BLIP.
    """
    from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval

    kind = published(name)
    if kind.model_type != "blip":
        raise ValueError(f"{name} holds a model of type '{kind.model_type}', but a captioner is loaded from BLIP only.")
    retrieval = "BlipForImageTextRetrieval" in (kind.architectures or ())
    layout = BlipForImageTextRetrieval if retrieval else BlipForConditionalGeneration
    with asked(name, "captioner"):
        loaded: Any = layout.from_pretrained(name, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
    blip, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"{name} lacks {len(report['missing_keys'])} weights of a BLIP captioner, such as "
            f"{min(report['missing_keys'])}. Choose a checkpoint that was trained for captioning, or for retrieval."
        )
    captioner = Captioner(blip.config, Vocabulary(tokenizer, blip.config.text_config.bos_token_id), decoders=())
    captioner.vision = blip.vision_model
    if retrieval:
        captioner.matching = Matching.adopt(blip, captioner.vocabulary)
    else:
        captioner.decoders[BASE] = blip.text_decoder
    return captioner.eval()


def published(name: str) -> "transformers.PreTrainedConfig":
    """What a published model says of itself; errors as `asked` has them."""
    from transformers import AutoConfig

    with asked(name, "captioner"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
