"""Tokenizers against their authors' code, with the same random weights: how far apart latents, codes and pictures are.

    python -m benchmarks.tokenizers_exact [--vit DIR] [--dalle DIR] [--maskgit DIR] [--taming DIR] [--ldm DIR]
        [--layouts tests/data/layouts]

The code is no part of this project: give folders of the repositories, each at the commit that is named below. What its
training has beside a tokenizer (LPIPS, a critic) is not built, so no layout has the names of its weights, which a
published checkpoint may hold.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from torch import nn

from t2i.pixels import from_unit, to_unit
from t2i.tokenizers import kl, layouts, likelihood, vqgan
from t2i.tokenizers.dvae import dalle_dvae
from t2i.tokenizers.maskgit_vqgan import maskgit_vqgan
from t2i.tokenizers.vit_vqgan import ViTVQGANConfig, vit_vqgan_base, vit_vqgan_large, vit_vqgan_small

VIT = "thuanz123/enhancing-transformers", "e1c185da5cc0eeefdded68cbff888d5b9c248372"
DALLE = "openai/DALL-E", "5be4b236bc3ade6943662354117a0e83752cc322"
TAMING = "CompVis/taming-transformers", "3ba01b241669f5ade541ce990f7650a3b8f65318"
LDM = "CompVis/latent-diffusion", "a506df5756472e2ebaf9078affdde2c4f1502cd4"
MASKGIT = "bytedance/1d-tokenizer", "942a96fbdd873780179d1b78d5462911528bf8c8"

# Of latent-diffusion: our sizes by the folder of theirs.
FIRST_STAGES: dict[str, Callable[[], vqgan.VQGANConfig]] = {
    "vq-f4": vqgan.ldm_vq_f4,
    "vq-f8": vqgan.ldm_vq_f8,
    "vq-f8-n256": vqgan.ldm_vq_f8_256,
    "vq-f16": vqgan.ldm_vq_f16,
    "kl-f4": kl.kl_f4,
    "kl-f8": kl.kl_f8,
    "kl-f16": kl.kl_f16,
    "kl-f32": kl.kl_f32,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the authors' code lies; a model whose code is not given is left out."""

    vit: Path | None = None  # thuanz123/enhancing-transformers
    dalle: Path | None = None  # openai/DALL-E
    maskgit: Path | None = None  # bytedance/1d-tokenizer
    taming: Path | None = None  # CompVis/taming-transformers
    ldm: Path | None = None  # CompVis/latent-diffusion, which needs the former, too
    only: tuple[str, ...] = ()  # models of CompVis, by name; none: all
    side: int = 64  # pixels of the square pictures
    layouts: Path | None = None  # a folder, for the names and shapes of their weights


def main() -> None:
    """Print, a model a line, the largest difference of latents and of pictures, and the share of equal codes."""
    options = tyro.cli(Options)
    if options.dalle is not None:
        compare(dalle_dvae, DallE(options.dalle), DALLE, layouts.of_dalle, options)
    if options.maskgit is not None:
        compare(maskgit_vqgan, MaskGIT(options.maskgit), MASKGIT, layouts.of_1d_tokenizer, options)
    if options.taming is not None:
        for make in (vqgan.vqgan_f16_1024, vqgan.vqgan_f16_16384):
            if not options.only or make.__name__ in options.only:
                compare(make, Taming(options.taming, make().quantizer.size), TAMING, layouts.of_compvis, options)
    if options.ldm is not None and options.taming is not None:
        for name, make in FIRST_STAGES.items():
            if not options.only or make.__name__ in options.only:
                compare(make, LatentDiffusion(options.ldm, options.taming, name), LDM, layouts.of_compvis, options)
    if options.vit is not None:
        for make in (vit_vqgan_small, vit_vqgan_base, vit_vqgan_large):
            theirs = EnhancingTransformers(options.vit, make(), options.side)
            compare(make, theirs, VIT, layouts.of_enhancing_transformers, options)


@torch.no_grad()
def compare(
    make: Callable[[], Any], theirs: Any, source: tuple[str, str], converted: Callable[..., Any], options: Options
) -> None:
    """Fill their weights, take them over, and show both the same pictures."""
    images = torch.rand(2, 3, options.side, options.side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state = theirs.eval().state_dict()
    for number, (name, value) in enumerate(state.items()):
        if "pos_embedding" not in name:
            drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            fan_in = value[0].numel()
            value.copy_(drawn * fan_in**-0.5 if value.dim() > 1 else drawn * 0.1 + name.endswith("weight"))
    with torch.device("meta"):
        ours = make().build().eval()
    ours.load_state_dict(converted(state), assign=True)
    hidden, values = theirs.encode(images)
    rebuilt = theirs.decode(values)
    apart = (ours.hidden(images) - hidden).abs().max()
    vectors = values if values.is_floating_point() else ours.quantizer.lookup(values)
    seen = (ours.pictures(ours.reconstruct(vectors)) - rebuilt).abs().max()
    codes = f"values {(ours.encode(images) - values).abs().max():.1e}"
    if not values.is_floating_point():
        equal = (ours.encode(images) == values).float().mean()
        codes = f"codes equal {equal:.4f} of {values.unique().numel()} different"
    print(
        f"{make.__name__:<16} latents {apart:.1e} (deviation {hidden.std():.2f}), {codes}, "
        f"pictures {seen:.1e} (deviation {rebuilt.std():.2f})",
        flush=True,
    )
    if options.layouts is not None:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(list(value.shape))}" for name, value in state.items())
        head = f'{{\n "repository": "{source[0]}",\n "commit": "{source[1]}",\n "shapes": {{\n'
        Path(options.layouts, f"{make.__name__}.json").write_text(f"{head}{lines}\n }}\n}}\n")


class CompVis(nn.Module):
    """A model of theirs, which wants Lightning, and within it only what is no loss."""

    def __init__(self, folder: Path, module: str, name: str, params: dict[str, Any]) -> None:
        super().__init__()
        sys.path.insert(0, str(folder))
        lightning, beside = ModuleType("pytorch_lightning"), ModuleType("main")
        lightning.LightningModule = nn.Module  # type: ignore[attr-defined]
        beside.instantiate_from_config = lambda config: nn.Identity()  # type: ignore[attr-defined]
        sys.modules |= {"pytorch_lightning": lightning, "main": beside}
        theirs = importlib.import_module(module)
        theirs.instantiate_from_config = lambda config: nn.Identity()  # type: ignore[attr-defined]
        kept = {key: value for key, value in params.items() if key != "monitor"}
        self.theirs = getattr(theirs, name)(**kept)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Theirs alone, by their names."""
        return self.theirs.state_dict(*args, **kwargs)

    def decode(self, values: torch.Tensor) -> torch.Tensor:
        """Pictures, not clamped."""
        if values.is_floating_point():
            return self.theirs.decode(values)
        shape = (*values.shape, self.theirs.quantize.embedding.weight.shape[1])
        return self.theirs.decode(self.theirs.quantize.get_codebook_entry(values.flatten(), shape))

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents or moments, and codes (B, h, w) or the mode of the latents."""
        hidden = self.theirs.quant_conv(self.theirs.encoder(images))
        if not hasattr(self.theirs, "quantize"):
            return hidden, self.theirs.encode(images).mode()
        codes = self.theirs.quantize(hidden)[2][2]
        return hidden, codes.view(len(images), *hidden.shape[2:])


class Taming(CompVis):
    """Their VQGAN, as its configuration of ImageNet has it, with so many codes."""

    def __init__(self, folder: Path, codes: int) -> None:
        told = yaml.safe_load((folder / "configs/imagenet_vqgan.yaml").read_text())["model"]["params"]
        super().__init__(folder, "taming.models.vqgan", "VQModel", told | {"n_embed": codes})


class LatentDiffusion(CompVis):
    """One of their first stages, as its configuration has it."""

    def __init__(self, folder: Path, taming: Path, name: str) -> None:
        sys.path.insert(0, str(taming))
        told = yaml.safe_load((folder / f"models/first_stage_models/{name}/config.yaml").read_text())["model"]
        module, _, kind = told["target"].rpartition(".")
        super().__init__(folder, module, kind, told["params"])


class EnhancingTransformers(nn.Module):
    """Their parts, as their `ViTVQ` has them, which wants Lightning."""

    def __init__(self, folder: Path, config: ViTVQGANConfig, side: int) -> None:
        super().__init__()
        np.float = float  # type: ignore[attr-defined]  # NumPy had this name when they wrote
        parts = loaded(folder / "enhancing/modules/stage1/layers.py")
        quantizers = loaded(folder / "enhancing/modules/stage1/quantizers.py")
        shapes = [
            {"dim": tower.width, "depth": tower.layers, "heads": tower.heads, "mlp_dim": 4 * tower.width}
            for tower in (config.encoder, config.decoder)
        ]
        self.encoder = parts.ViTEncoder(side, config.patch, **shapes[0])
        self.decoder = parts.ViTDecoder(side, config.patch, **shapes[1])
        self.quantizer = quantizers.VectorQuantizer(config.quantizer.width, config.quantizer.size)
        self.pre_quant = nn.Linear(config.encoder.width, config.quantizer.width)
        self.post_quant = nn.Linear(config.quantizer.width, config.decoder.width)
        self.grid = config.grid((side, side))

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, D, h, w) and codes (B, h, w)."""
        latents = self.pre_quant(self.encoder(to_unit(images)))
        codes = self.quantizer(latents)[2]
        return latents.transpose(1, 2).unflatten(2, self.grid), codes.unflatten(1, self.grid)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pictures, not clamped."""
        vectors = self.quantizer.norm(self.quantizer.embedding(codes.flatten(1)))
        return from_unit(self.decoder(self.post_quant(vectors)))


class DallE(nn.Module):
    """Their encoder and decoder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        sys.path.insert(0, str(folder))
        from dall_e.decoder import Decoder  # type: ignore[import-not-found]
        from dall_e.encoder import Encoder  # type: ignore[import-not-found]
        from dall_e.utils import map_pixels  # type: ignore[import-not-found]

        self.encoder, self.decoder, self._map_pixels = Encoder(), Decoder(), map_pixels

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, K, h, w) and codes (B, h, w)."""
        logits = self.encoder(self._map_pixels(to_unit(images)))
        return logits, logits.argmax(1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pictures, not clamped, as theirs are; ours do so later."""
        vectors = nn.functional.one_hot(codes, 8192).permute(0, 3, 1, 2).float()
        return likelihood.unsqueezed(self.decoder(vectors)[:, :3].sigmoid())


class MaskGIT(nn.Module):
    """Their parts, as their `PretrainedTokenizer` has them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        parts = loaded(folder / "modeling/modules/maskgit_vqgan.py")
        config = {"channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "dropout": 0.0, "hidden_channels": 128}
        config |= {"num_channels": 3, "num_res_blocks": 2, "resolution": 256, "z_channels": 256}
        self.encoder, self.decoder = parts.Encoder(SimpleNamespace(**config)), parts.Decoder(SimpleNamespace(**config))
        self.quantize = parts.VectorQuantizer(1024, 256, 0.25)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, D, h, w) and codes (B, h, w)."""
        latents = self.encoder(to_unit(images))
        return latents, self.quantize(latents)[1].unflatten(1, latents.shape[2:])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pictures, not clamped."""
        return from_unit(self.decoder(self.quantize.get_codebook_entry(codes)))


def loaded(path: Path) -> ModuleType:
    """A file as a module, without the package that it stands in."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
