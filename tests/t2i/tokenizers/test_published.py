"""Weights of others load, draw the same pictures, and go back."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from t2i.pixels import scale
from t2i.tokenizers.autoencoder import Noise
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.diffusers_folder import save_diffusers
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from t2i.tokenizers.published import PublishedConfig, load_published, read_published
from t2i.tokenizers.scale import Scale
from t2i.tokenizers.task import load_tokenizer, save_tokenizer
from t2i.tokenizers.vit_vqgan import TowerConfig, ViTVQGANConfig
from t2i.tokenizers.vqgan import VQGANConfig
from workflows.options import recipe_options

PLAIN = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 6,
    "norm_num_groups": 4,
}
VQ = {
    "attention at one level": {**PLAIN, "num_vq_embeddings": 16, "vq_embed_dim": 3},
    "the width of the latents": {**PLAIN, "num_vq_embeddings": 8},
    "no attention": {
        **PLAIN,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "mid_block_add_attention": False,
        "num_vq_embeddings": 16,
    },
}
KL = {
    "plain": PLAIN,
    "no convolutions around, a shift": {
        **PLAIN, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.36, "shift_factor": 0.1159,
    },
    "a mean and a deviation a channel": {
        **PLAIN, "scaling_factor": 0.5, "latents_mean": [0.5, -1.0, 0.0, 2.0, 0.25, 3.0],
        "latents_std": [1.0, 2.0, 4.0, 0.5, 0.25, 8.0],
    },
    "no scale": {**PLAIN, "scaling_factor": 1.0, "mid_block_add_attention": False},
}  # fmt: skip
SCALES = {
    "plain": Scale(factor=(0.18215,)),
    "no convolutions around, a shift": Scale(factor=(0.36,), shift=(0.1159,)),
    "a mean and a deviation a channel": Scale(
        factor=(0.5, 0.25, 0.125, 1.0, 2.0, 0.0625), shift=(0.5, -1.0, 0.0, 2.0, 0.25, 3.0)
    ),
    "no scale": None,
}


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def images(rows=2, size=(8, 12)):
    return scale(torch.randint(256, (rows, 3, *size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def alike(ours, theirs):
    """The same latents, codes and pictures."""
    pictures = images()
    latents = theirs.encode(pictures).latents
    close(ours.hidden(pictures), latents)
    codes = theirs.quantize(latents)[2][2].view(2, 4, 6)
    assert torch.equal(ours.encode(pictures), codes)
    close(ours.decode(codes), theirs.decode(latents).sample.clamp(-1, 1))


@torch.no_grad()
def alike_kl(ours, theirs):
    """The same moments, draws, values and pictures, without and with the scale."""
    pictures = images()
    posterior, scale = theirs.encode(pictures).latent_dist, ours.scale or Scale()
    mean, deviation = ours.moments(pictures)
    close(mean, scale.to(posterior.mean))
    close(deviation, scale.spread(posterior.std))
    close(ours.encode(pictures), mean)
    drawn = ours.quantize(pictures, Noise(torch.arange(2), 0))
    close(drawn.losses["kl"], posterior.kl())
    close(ours.reconstruct(drawn.vectors), theirs.decode(drawn.vectors).sample)
    close(ours.decode(mean), theirs.decode(posterior.mode()).sample.clamp(-1, 1))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", VQ)
def test_a_vq_model_of_diffusers_comes_and_goes(name, tmp_path):
    theirs = filled(VQModel(**VQ[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_published(f"{tmp_path}/theirs").eval()
    alike(ours, theirs)
    save_diffusers(ours, f"{tmp_path}/back")
    back = VQModel.from_pretrained(tmp_path / "back").eval()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert back.config.scaling_factor == theirs.config.scaling_factor == 0.18215
    save_tokenizer(ours, str(tmp_path))
    alike(load_tokenizer(str(tmp_path)), theirs)


@pytest.mark.parametrize("name", KL)
def test_a_kl_autoencoder_of_diffusers_comes_and_goes(name, tmp_path):
    theirs = filled(AutoencoderKL(**KL[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_published(f"{tmp_path}/theirs").eval()
    assert ours.scale == SCALES[name]
    alike_kl(ours, theirs)
    save_diffusers(ours, f"{tmp_path}/back")
    back = AutoencoderKL.from_pretrained(tmp_path / "back").eval()
    assert same(theirs.state_dict(), back.state_dict())
    again = read_published(f"{tmp_path}/back")
    assert (again.config, again.scale) == (ours.config, ours.scale)
    assert same(again.state, ours.state_dict())
    kept = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "latent_channels")
    if "latents_mean" not in KL[name]:
        assert {each: back.config[each] for each in kept} == {each: theirs.config[each] for each in kept}


def test_a_folder_that_tells_no_scale_has_that_of_diffusers(tmp_path):
    filled(AutoencoderKL(**PLAIN)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in told.items() if k != "scaling_factor"}))
    assert load_published(str(tmp_path)).scale == Scale(
        factor=(AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor,)
    )


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"latents_mean": [0.0] * 6}, "latents_mean and latents_std one alone"),
        ({"latents_mean": [0.0] * 6, "latents_std": [1.0] * 6, "shift_factor": 1.0}, "or a shift_factor beside"),
        ({"latents_mean": [0.0] * 5, "latents_std": [1.0] * 5}, "It has 6 channels of latents"),
        ({"latents_mean": [0.0] * 6, "latents_std": [0.0] * 6}, "It has 6 channels of latents"),
        ({"scaling_factor": 0.0}, "factors are above 0"),
        ({"use_quant_conv": False}, "only one is true"),
    ],
    ids=["a mean alone", "a mean and a shift", "of five", "no deviation", "zero", "one convolution"],
)
def test_a_scale_or_convolutions_that_cannot_be_are_told(told, wanted, tmp_path):
    filled(AutoencoderKL(**PLAIN)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | told))
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{wanted}"):
        load_published(str(tmp_path))


@pytest.mark.parametrize("name", ["plain", "no convolutions around, a shift"])
def test_a_tokenizer_of_ours_is_named_like_others(name, tmp_path):
    ours = load_published(folder_of_kl(tmp_path / "theirs", name))
    (tmp_path / "kept").mkdir()
    save_tokenizer(ours, str(tmp_path / "kept"))
    config = PublishedConfig(path=f"{tmp_path}/kept")
    again = config.build()
    assert (again.config, again.scale) == (ours.config, ours.scale)
    assert same(again.state_dict(), ours.state_dict())
    assert all(each.requires_grad for each in again.parameters()), "a training may begin from it"
    assert config.grid((8, 12)) == (4, 6)
    (tmp_path / "kept/config.json").write_text('{"model": {"class": "VQGANConfig", "chanels": 8}}')
    with pytest.raises(ValueError, match="chanels"):
        config.build()


def folder_of_kl(folder, name):
    filled(AutoencoderKL(**KL[name])).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_within_a_pipeline_and_one_without_safetensors(tmp_path):
    theirs = filled(VQModel(**VQ["attention at one level"]))
    theirs.save_pretrained(tmp_path / "vqvae", safe_serialization=False)
    (tmp_path / "model_index.json").write_text("{}")
    alike(PublishedConfig(path=str(tmp_path)).build().eval(), theirs)
    assert PublishedConfig(path=str(tmp_path)).grid((8, 12)) == (4, 6)


def test_older_names_of_attention(tmp_path):
    theirs = filled(VQModel(**VQ["attention at one level"]))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in load_file(file).items():
        for new, old in older.items():
            name = name.replace(new, old)
        state[name] = value
    save_file(state, file)
    alike(load_published(str(tmp_path)).eval(), theirs)


def by_their_authors(state, levels):
    """Names of CompVis for a state of diffusers: written apart from what is tested."""
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] in ("encoder", "decoder") and parts[1] in ("down_blocks", "up_blocks"):
            place = int(parts[2]) if parts[1] == "down_blocks" else levels - 1 - int(parts[2])
            kind = {"resnets": "block", "attentions": "attn"}.get(parts[3])
            head = [parts[0], parts[1].split("_")[0], str(place)]
            parts = [*head, kind, *parts[4:]] if kind else [*head, parts[3][:-2], *parts[5:]]
        elif parts[1] == "mid_block":
            kind = {"resnets": "block", "attentions": "attn"}[parts[2]]
            parts = [parts[0], "mid", f"{kind}_{int(parts[3]) + 1}", *parts[4:]]
        name = ".".join(parts).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if ".attn" in name:
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            for new, old in names.items():
                name = name.replace(f".{new}.", f".{old}.")
            value = value[:, :, None, None] if value.dim() == 2 else value
        found[name] = value
    return found


def test_files_of_kl_autoencoders_of_latent_diffusion(tmp_path):
    theirs = filled(AutoencoderKL(**PLAIN | {"block_out_channels": (32, 64), "norm_num_groups": 32}))
    state = by_their_authors(theirs.state_dict(), 2)
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, tmp_path / "model.ckpt")
    ours = load_published(f"{tmp_path}/model.ckpt").eval()
    assert (ours.config.quantizer, ours.scale) == (GaussianConfig(width=6), None)
    alike_kl(ours, theirs)
    whole = {f"first_stage_model.{name}": each for name, each in state.items()}
    torch.save({"state_dict": whole | {"scale_factor": torch.tensor(0.25)}}, tmp_path / "model.ckpt")
    assert load_published(f"{tmp_path}/model.ckpt").scale == Scale(factor=(0.25,))


@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "a whole latent diffusion"])
def test_files_of_their_authors(kind, tmp_path):
    sizes = {**VQ["attention at one level"], "block_out_channels": (32, 64), "norm_num_groups": 32}
    theirs = filled(VQModel(**sizes))
    state = by_their_authors(theirs.state_dict(), 2)
    assert "encoder.mid.attn_1.q.weight" in state
    assert state["encoder.mid.attn_1.q.weight"].dim() == 4
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, file)
    elif kind == "ckpt":
        beside = {"loss.discriminator.main.0.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
        torch.save({"state_dict": state | beside, "epoch": 3}, file)
    else:
        around = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(9)}
        torch.save({"state_dict": {f"first_stage_model.{name}": each for name, each in state.items()} | around}, file)
    ours = load_published(str(file)).eval()
    assert ours.config == VQGANConfig(
        channels=32,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(1,),
        latent_channels=6,
        quantizer=CodebookConfig(size=16, width=3),
    )
    alike(ours, theirs)


OTHERS = {  # a config, and their names for ours, the first pattern that is found
    "maskgit vqgan.bin": (
        MaskGITVQGANConfig(channels=32, multipliers=(1, 2), blocks=1, quantizer=CodebookConfig(size=16, width=6)),
        {
            r"coder\.(from_pixels|from_codes)": "coder.conv_in",
            r"coder\.(to_pixels|to_codes)": "coder.conv_out",
            r"coder\.norm\.": "coder.norm_out.",
            r"upward\.(\d+)": r"up.\1.upsample_conv",
            r"middle": "mid",
            r"encoder\.levels\.(\d+)\.(\d+)": r"encoder.down.\1.block.\2",
            r"decoder\.levels\.(\d+)\.(\d+)": r"decoder.up.\1.block.\2",
            r"quantizer\.vectors": "quantize.embedding.weight",
        },
        {"shortcut": "nin_shortcut"},
        {},
    ),
    "vit vqgan.ckpt": (
        ViTVQGANConfig(
            patch=2,
            encoder=TowerConfig(layers=1, width=16, heads=1),
            decoder=TowerConfig(layers=2, width=32, heads=2),
            quantizer=CodebookConfig(size=16, width=4, normalize=True),
        ),
        {
            r"from_pixels": "encoder.to_patch_embedding.0",
            r"to_pixels": "decoder.to_pixel.1",
            r"to_codes": "pre_quant",
            r"from_codes": "post_quant",
            r"quantizer\.vectors": "quantizer.embedding.weight",
            r"blocks\.(\d+)\.(norm_attention|qkv|out)": r"transformer.layers.\1.0.\2",
            r"blocks\.(\d+)\.(norm_mlp|up|down)": r"transformer.layers.\1.1.\2",
            r"coder\.norm": "coder.transformer.norm",
        },
        {
            "norm_attention": "norm",
            "norm_mlp": "norm",
            "qkv": "fn.to_qkv",
            "out": "fn.to_out",
            "up": "fn.net.0",
            "down": "fn.net.2",
        },
        {"loss.discriminator.0.weight": torch.zeros(1), "encoder.en_pos_embedding": torch.zeros(1, 4, 16)},
    ),
}


@pytest.mark.parametrize("file", OTHERS)
def test_files_of_others(file, tmp_path):
    config, names, parts, beside = OTHERS[file]
    theirs, state = filled(config.build()), dict(beside)
    for ours, value in theirs.state_dict().items():
        pattern = next((each for each in names if re.search(each, ours)), None)
        name = re.sub(pattern, names[pattern], ours) if pattern else ours
        state[".".join(parts.get(part, part) for part in name.split("."))] = value
    torch.save({"state_dict": state} if file.endswith("ckpt") else state, tmp_path / file)
    found = PublishedConfig(path=str(tmp_path / file))
    tokenizer = found.build().eval()
    assert tokenizer.config == config
    assert same(tokenizer.state_dict(), theirs.state_dict())
    assert torch.equal(tokenizer.encode(images()), theirs.encode(images()))
    assert found.grid((8, 12)) == (4, 6)
    assert recipe_options(["debug", "--tokenizer", found.path], "plan").recipe.tokenizer.model == found


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_no_code_of_a_file_runs(tmp_path, capfd):
    torch.save({"state_dict": Evil()}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_published(f"{tmp_path}/model.ckpt")
    assert "this ran" not in capfd.readouterr().out


def folder_of(tmp_path, change=None, drop=(), **told):
    VQModel(**VQ["attention at one level"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | told))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {name: value for name, value in load_file(file).items() if name not in drop}
    save_file(state | (change or {}), file)
    return str(tmp_path)


WRONG = {
    "another class": ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel, where .* diffusers' VQModel"),
    "another activation": ({"act_fn": "relu"}, "its act_fn is relu, not silu"),
    "other blocks": ({"down_block_types": ["DownBlock2D"] * 2}, "its blocks are"),
    "other sizes": ({"num_vq_embeddings": 17}, r"quantizer\.vectors of .* is of shape \(16, 3\), where .* \(17, 3\)"),
    "more levels": (
        {"block_out_channels": [8, 16, 16], "down_block_types": ["DownEncoderBlock2D"] * 3,
         "up_block_types": ["UpDecoderBlock2D"] * 3},
        "lacks .* weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_kind_is_told(name, tmp_path):
    told, wanted = WRONG[name]
    with pytest.raises(ValueError, match=wanted):
        read_published(folder_of(tmp_path, **told))


def test_weights_that_lack_or_are_over_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"lacks 1 weights of a tokenizer like this, such as decoder\.conv_out\.bias"):
        read_published(folder_of(tmp_path / "a", drop=["decoder.conv_out.bias"]))
    with pytest.raises(ValueError, match=r"No weight of .* is called 'more'"):
        read_published(folder_of(tmp_path / "b", change={"more": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        read_published(f"{tmp_path}/nowhere")
    (tmp_path / "a/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        read_published(f"{tmp_path}/a")
    (tmp_path / "a/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="There are no weights in"):
        read_published(f"{tmp_path}/a")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json of one"):
        read_published(f"{tmp_path}/c")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is no tokenizer of taming-transformers"):
        read_published(f"{tmp_path}/a.pt")


def test_what_diffusers_does_not_have_is_not_written(tmp_path):
    small = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "latent_channels": 4}
    for quantizer in (FiniteScalarConfig(), CodebookConfig(size=8, width=4, normalize=True)):
        with pytest.raises(ValueError, match="no tokenizer with a quantizer like"):
            save_diffusers(VQGANConfig(**small, attention_levels=(), quantizer=quantizer).build(), str(tmp_path))


def test_diffusers_vq_model_has_one_scale_and_its_convolutions(tmp_path):
    small = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "latent_channels": 4}
    tokenizer = VQGANConfig(**small, attention_levels=(), quantizer=CodebookConfig(size=8, width=4)).build()
    for told in (Scale(factor=(1.0,) * 4, shift=(0.0,) * 4), Scale(shift=(1.0,))):
        tokenizer.scale = told
        with pytest.raises(ValueError, match="one scaling_factor and no shift"):
            save_diffusers(tokenizer, str(tmp_path))
    bare = VQGANConfig(**small, attention_levels=(), quantizer=CodebookConfig(size=8, width=4), pointwise=False)
    with pytest.raises(ValueError, match="no tokenizer with a quantizer like"):
        save_diffusers(bare.build(), str(tmp_path))
    narrow = VQGANConfig(**small, attention_levels=(), quantizer=GaussianConfig(width=3))
    with pytest.raises(ValueError, match="no tokenizer with a quantizer like"):
        save_diffusers(narrow.build(), str(tmp_path))


def test_without_convolutions_around_widths_have_to_fit():
    VQGANConfig(latent_channels=16, quantizer=GaussianConfig(width=16), pointwise=False)
    for quantizer in (GaussianConfig(width=4), CodebookConfig(size=8, width=4)):
        with pytest.raises(ValueError, match="as wide as latent_channels, 16"):
            VQGANConfig(latent_channels=16, quantizer=quantizer, pointwise=False)
