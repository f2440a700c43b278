"""Weights of others load, draw the same pictures, and go back."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from t2i.pixels import scale
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.published import PublishedConfig, load_published, read_published, save_diffusers
from t2i.tokenizers.task import load_tokenizer, save_tokenizer
from t2i.tokenizers.vqgan import VQGANConfig

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
    save_tokenizer(ours, str(tmp_path))
    alike(load_tokenizer(str(tmp_path)), theirs)


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
    "another class": ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel, where diffusers' .*VQModel"),
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
    with pytest.raises(ValueError, match=r"has, beside ours, 1 weights .* such as more"):
        read_published(folder_of(tmp_path / "b", change={"more": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        read_published(f"{tmp_path}/nowhere")
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json of one"):
        read_published(f"{tmp_path}/c")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is no VQGAN of taming-transformers"):
        read_published(f"{tmp_path}/a.pt")


def test_what_diffusers_does_not_have_is_not_written(tmp_path):
    small = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "latent_channels": 4}
    for quantizer in (FiniteScalarConfig(), CodebookConfig(size=8, width=4, normalize=True)):
        with pytest.raises(ValueError, match="no tokenizer with a quantizer like"):
            save_diffusers(VQGANConfig(**small, attention_levels=(), quantizer=quantizer).build(), str(tmp_path))


def test_a_kl_autoencoder_is_told_apart(tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoencoderKL"):
        read_published(str(tmp_path))
