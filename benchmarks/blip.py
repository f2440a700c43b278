"""A BLIP of published shape and random weights, in the published layout, and pictures to caption."""

import io
import json
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.bert.tokenization_bert import BertTokenizerFast

Size = Literal["demo", "base", "large"]
SIZES: dict[Size, tuple[int, ...]] = {  # vision tower: pixels, patch, width, layers, heads, mlp
    "demo": (32, 8, 128, 2, 4, 384),
    "base": (384, 16, 768, 12, 12, 3072),
    "large": (384, 16, 1024, 24, 16, 4096),
}
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 30522: "[DEC]", 30523: "[ENC]"}


def make_model(folder: str, size: Size = "base", seed: int = 0) -> str:
    """Weights, configuration, tokenizer and image processor as `Salesforce/blip-image-captioning-*` lays them out.

    The decoder is BERT-base for "base" and "large", as published; the demo's is as small as its tower.
    """
    torch.manual_seed(seed)
    pixels, patch, width, layers, heads, mlp = SIZES[size]
    text: dict[str, int] = {"encoder_hidden_size": width}
    if size == "demo":
        small = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        text |= small | {"intermediate_size": mlp, "vocab_size": 600, "bos_token_id": 104}
    config = transformers.BlipConfig(
        vision_config={
            "image_size": pixels,
            "patch_size": patch,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": mlp,
        },
        text_config=text,
    )
    model = transformers.BlipForConditionalGeneration(config)
    model.save_pretrained(folder)
    words = [SPECIAL.get(number, f"word{number}") for number in range(text.get("vocab_size", 30524))]
    Path(folder, "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(Path(folder, "vocab.txt")), model_max_length=512)
    images = transformers.BlipImageProcessor(size={"height": pixels, "width": pixels})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def draw_photo(number: int, seed: int = 0, size: tuple[int, int] = (480, 640)) -> bytes:
    """A JPEG (height, width) of soft colours and some grain, some 60 kB: what decoding a photograph costs."""
    rng = np.random.default_rng([seed, number])
    height, width = size
    colours = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    sink = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=80)
    return sink.getvalue()


def alt_text(number: int) -> str:
    """Two words."""
    return f"word{200 + number % 300} word7"


def write_corpus(folder: str, images: int, shards: int, size: tuple[int, int] = (480, 640), seed: int = 0) -> str:
    """WebDataset tars of photographs with alt texts; returns their pattern."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for shard, numbers in enumerate(np.array_split(np.arange(images), shards)):
        with tarfile.open(Path(folder, f"{shard:06d}.tar"), "w") as tar:
            for number in numbers.tolist():
                about = json.dumps({"split": "train"}).encode()
                members = {
                    "jpg": draw_photo(number, seed, size),
                    "txt": alt_text(number).encode(),
                    "json": about,
                }
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(Path(folder, "*.tar"))
