"""Every size that has a name is the published one, to the last parameter, and is found without a list of them."""

import json

import pytest
import torch
import transformers

from captioner.model import blip_base, blip_large
from t2i.conditions.encoders import TextEncoderConfig, sizes_of
from t2i.conditions.published import CLIPTextConfig, T5EncoderConfig
from t2i.priors.autoregressive import autoregressive_shapes
from t2i.tokenizers.patch_vqgan import patch_vqgan_shapes
from tests.t2i.conditions import tiny as encoders
from tests.workflows.test_command import run
from workflows import models
from workflows.recipes import demo

# Of the authors' own code, where not said: taming-transformers, latent-diffusion, LTH14/mar, openai/DALL-E; of others'
# for ViT-VQGAN (thuanz123/enhancing-transformers) and MaskGIT's VQGAN (bytedance/1d-tokenizer). Of BLIP the weights
# that Salesforce published, without the embedding that lies in their file twice.
PUBLISHED = {
    "vqgan_f16_1024": 72_141_699,
    "vqgan_f16_16384": 76_073_859,
    "ldm_vq_f4": 55_322_782,
    "ldm_vq_f8": 67_717_295,
    "ldm_vq_f8_256": 67_652_783,
    "ldm_vq_f16": 69_593_371,
    "vq_vae_imagenet": 4_811_843,
    "vit_vqgan_small": 50_908_195,
    "vit_vqgan_base": 170_664_483,
    "vit_vqgan_large": 613_487_907,
    "dalle_dvae": 97_616_006,
    "maskgit_vqgan": 54_515_587,
    "kl_f4": 55_312_063,
    "kl_f8": 83_653_863,
    "kl_f16": 69_610_963,
    "kl_f32": 103_880_131,
    "mar_b": 207_924_768,
    "mar_l": 478_326_304,
    "mar_h": 942_403_104,
    "clip_b32": 151_277_313,
    "clip_b16": 149_620_737,
    "clip_l14": 427_616_513,
    "clip_l14_336": 427_944_193,
    "clip_text_b32": 63_165_952,
    "clip_text_l14": 123_060_480,
    "clip_text_h14": 340_387_840,
    "clip_text_bigg14": 694_659_840,
    "t5_small": 35_330_816,
    "t5_base": 109_628_544,
    "t5_large": 334_939_648,
    "t5_3b": 1_240_909_824,
    "t5_11b": 4_864_791_552,
    "t5_v1_1_small": 35_332_800,
    "t5_v1_1_base": 109_628_544,
    "t5_v1_1_large": 341_231_104,
    "t5_v1_1_xl": 1_223_527_424,
    "t5_v1_1_xxl": 4_762_310_656,
    "blip_base": 247_414_076 - 30_524 * 768,
    "blip_large": 469_732_924 - 30_524 * 768,
}


@pytest.mark.parametrize("name", models.named())
def test_a_size_is_what_is_said_of_it(name):
    found = models.named()[name]
    assert found.count() == found.parameters > 0
    assert found.parameters == PUBLISHED.get(name, found.parameters)
    row = found.row()
    assert row["draws"]
    assert row["hears"]
    assert (name in PUBLISHED) == bool(row["paper"])
    assert row["paper"] or "no paper has it" in found.about
    assert found.about.splitlines()[0].endswith(" parameters.")


@pytest.mark.parametrize("name", [name for name, each in models.named().items() if each.family == "encoder"])
def test_a_text_encoder_has_what_its_papers_layers_add_up_to(name):
    """By hand: embeddings, and of each layer attention, MLP and norms."""
    (config,) = models.named()[name].make()
    if isinstance(config, CLIPTextConfig):
        width = config.width
        layer = 4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 4 * width
        wanted = (49_408 + 77) * width + config.layers * layer + 2 * width + config.projection * width
    else:
        inner = config.heads * config.head_width
        layer = 4 * config.width * inner + (2 + config.gated) * config.width * config.inner + 2 * config.width
        wanted = 32_128 * config.width + 32 * config.heads + config.layers * layer + config.width
    assert models.named()[name].parameters == wanted


def test_a_text_encoder_is_the_one_that_is_loaded(tmp_path):
    """Its features are read, as those of any folder."""
    config = CLIPTextConfig(width=16, layers=2, heads=2, projection=8, length=12)
    folder = encoders.clip(str(tmp_path))  # its tokenizer
    config.build().save_pretrained(folder)
    sizes = sizes_of(TextEncoderConfig(model=folder, pooled="projected"))
    assert (sizes.kind, sizes.width, sizes.pooled, sizes.length) == ("clip", 16, 8, 12)
    small = T5EncoderConfig(width=16, layers=2, heads=2, inner=24, head_width=8)
    folder = encoders.t5(str(tmp_path / "t5"))
    small.build().save_pretrained(folder)
    sizes = sizes_of(TextEncoderConfig(model=folder))
    assert (sizes.kind, sizes.width, sizes.masked) == ("t5", 16, True)


def test_all_that_is_published_is_there():
    assert {*PUBLISHED} < {*models.named()}


@pytest.mark.parametrize(("make", "hidden", "layers", "heads"), [(blip_base, 768, 12, 12), (blip_large, 1024, 24, 16)])
def test_blip_has_the_weights_of_transformers_own(make, hidden, layers, heads):
    text = {"vocab_size": 30_524, "num_attention_heads": 12}
    vision = {"image_size": 384, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    theirs = transformers.BlipConfig(text_config=text, vision_config=vision | {"intermediate_size": 4 * hidden})
    config, vocabulary = make()
    with torch.device("meta"):
        captioner = config.build(vocabulary)
        blip = transformers.BlipForConditionalGeneration(theirs)
    assert shapes(captioner.vision) == shapes(blip.vision_model)
    assert shapes(captioner.decoders["alt"]) == shapes(blip.text_decoder)


def shapes(module):
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_what_the_demo_has_is_called_so():
    recipe = demo()
    assert recipe.tokenizer.model == patch_vqgan_shapes()
    config, space, (words,) = autoregressive_shapes()
    assert recipe.prior.model == config
    assert space == patch_vqgan_shapes().build().space(recipe.corpus.image_size)
    assert (words.vocabulary_size, words.length) == (recipe.prior.vocabulary_size, recipe.prior.text_length)


def test_list_models(capsys):
    code, out, _ = run(capsys, "list", "models", "--json")
    assert code == 0
    *lines, last = out.strip().splitlines()
    rows = json.loads(last)["models"]
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows] == list(models.named())
    assert [line.split()[1] for line in lines] == [f"{row['parameters']:,}" for row in rows]
    by_name = {row.pop("name"): row for row in rows}
    assert by_name["mar_b"] == {
        "family": "prior",
        "paper": "arXiv 2406.11838",
        "parameters": 207_924_768,
        "draws": "16x16x16 latents",
        "hears": "label",
    }
    assert by_name["vqgan_f16_1024"]["draws"] == "codes of 1,024, each of 16x16 pixels"
    assert by_name["kl_f8"]["draws"] == "latents of 4, each of 8x8 pixels"
    assert by_name["autoregressive_shapes"]["hears"] == "text"
    assert by_name["clip_text_bigg14"]["draws"] == "vectors of 1280 a token, and one of 1280 a text"
    assert (by_name["t5_v1_1_xxl"]["family"], by_name["t5_v1_1_xxl"]["hears"]) == ("encoder", "texts of 512 tokens")
    assert run(capsys, "list", "models", "--help")[0] == 0
    assert run(capsys, "list", "models", "--jsom")[0] == 1


def test_show_model(capsys):
    code, out, _ = run(capsys, "show", "model", "ldm_vq_f8_256")
    shown = json.loads(out)
    assert code == 0
    assert shown["parameters"] == PUBLISHED["ldm_vq_f8_256"]
    assert shown["config"]["quantizer"] == {"class": "CodebookConfig", "size": 256, "width": 4} | {
        "normalize": False,
        "linear": False,
        "ema": 0.0,
        "dead_below": 0.0,
    }
    assert "CompVis/latent-diffusion" in shown["about"]
    assert json.loads(run(capsys, "show", "model", "ldm_vq_f8_256", "--json")[1]) == shown
    code, _, err = run(capsys, "show", "model", "vqgan_f16_1042")
    assert code == 1
    assert "There is no model 'vqgan_f16_1042'. Did you mean 'vqgan_f16_1024'?" in err
    assert run(capsys, "show", "model")[0] == 2


PACKAGE = '''
from dataclasses import dataclass

from t2i.tokenizers.vqgan import VQGANConfig


@dataclass(frozen=True, kw_only=True)
class TinyConfig(VQGANConfig):
    """As ours."""


def tiny() -> TinyConfig:
    """Somebody's: 1 parameters.

    arXiv 1234.56789.
    """
    return TinyConfig(channels=32, multipliers=(1, 1))


def mar_b() -> TinyConfig:
    """A name that is taken: 1 parameters."""
    return TinyConfig()


def _hidden() -> TinyConfig:
    return TinyConfig()


def sized(channels: int = 32) -> TinyConfig:
    """Not one size."""
    return TinyConfig(channels=channels)


def words() -> list[str]:
    """No config."""
    return []
'''


def test_a_model_of_another_package_is_found_in_its_file(tmp_path, monkeypatch):
    (tmp_path / "tiny_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    import tiny_package  # type: ignore[import-not-found]

    known = {"rescribe.tokenizers": {"tiny": tiny_package.TinyConfig}}
    monkeypatch.setattr(models, "others", lambda group: known.get(group, {}))
    models.named.cache_clear()
    try:
        found = models.named()
        ours = {name for name, each in found.items() if each.module != "tiny_package"}
        assert {*found} - ours == {"tiny"}
        assert found["mar_b"].module == "t2i.priors.mar"
        row = found["tiny"].row()
        assert (row["family"], row["paper"], row["hears"]) == ("tokenizer", "arXiv 1234.56789", "pictures")
        assert row["draws"] == "codes of 1,024, each of 2x2 pixels"
        assert found["tiny"].count() == sum(p.numel() for p in tiny_package.tiny().build().parameters())
    finally:
        models.named.cache_clear()
