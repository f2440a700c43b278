"""Frozen text encoders against what transformers' users do with them."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.conditions.encoders import TextEncoder, TextEncoderConfig, place_of, sizes_of, tokens_of
from tests.t2i.conditions import tiny

pytestmark = pytest.mark.family("encoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"clip": tiny.clip, "t5": tiny.t5}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in made.items()}


def reader(folder, **fields):
    return TextEncoder(TextEncoderConfig(model=folder, precision="fp32", **fields))


def close(a, b):
    """Up to bf16's rounding."""
    torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=2**-9)


TEXTS = [*tiny.CAPTIONS, tiny.LONG]


def asked_of_clip(folder):
    """What pipelines of diffusers do before each CLIP: pad to its places, cut, and pass no mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    length = tokenizer.model_max_length
    return tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<pad>"])
def test_clip_is_read_as_stable_diffusion_reads_it(tmp_path, pad):
    folder = tiny.clip(tmp_path, pad=pad)
    ids = asked_of_clip(folder)
    ours, seen = tokens_of(TextEncoderConfig(model=folder))(TEXTS)
    assert torch.equal(torch.from_numpy(ours), ids)
    assert seen is None
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        plain = transformers.CLIPTextModel.from_pretrained(folder).eval()(ids)
    read = reader(folder, pooled="plain").read(TEXTS)
    assert (read.tokens.shape, read.tokens.dtype, read.seen) == ((5, 12, 16), torch.bfloat16, None)
    close(read.tokens, plain.last_hidden_state)  # version 1
    close(read.pooled, plain.pooler_output)  # Flux
    close(reader(folder, layer=2).read(TEXTS).tokens, model.text_model.final_layer_norm(out.hidden_states[-2]))  # 2
    large = reader(folder, layer=2, norm=False, pooled="projected").read(TEXTS)  # XL
    close(large.tokens, out.hidden_states[-2])
    close(large.pooled, out.text_embeds)
    alone = reader(folder, tokens=False, pooled="projected").read(TEXTS)
    assert alone.tokens is None
    close(alone.pooled, out.text_embeds)


def test_the_text_half_of_a_whole_clip(tmp_path):
    folder = tiny.clip(tmp_path, whole=True)
    model, ids = transformers.CLIPModel.from_pretrained(folder).eval(), asked_of_clip(folder)
    with torch.no_grad():
        out = model.get_text_features(ids)
    read = reader(folder, pooled="projected").read(TEXTS)
    close(read.tokens, out.last_hidden_state)
    close(read.pooled, out.pooler_output)


def test_t5_is_read_with_a_mask(folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["t5"])
    asked = tokenizer(TEXTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    model = transformers.T5EncoderModel.from_pretrained(folders["t5"]).eval()
    read = reader(folders["t5"]).read(TEXTS)
    with torch.no_grad():
        out = model(**asked, output_hidden_states=True)
        unmasked = model(asked["input_ids"])
        earlier = model.encoder.final_layer_norm(out.hidden_states[-2])
    mask = asked["attention_mask"].bool()
    assert torch.equal(read.seen, mask)
    close(read.tokens, out.last_hidden_state * mask[..., None])
    close(reader(folders["t5"], layer=2).read(TEXTS).tokens, earlier * mask[..., None])
    flux = reader(folders["t5"], masked=False).read(TEXTS)
    assert flux.seen is None
    close(flux.tokens, unmasked.last_hidden_state)
    assert (out.last_hidden_state - unmasked.last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_features_do_not_depend_on_the_batch(folders, encoder):
    for masked in (True, False):
        read = reader(folders[encoder], masked=masked)
        together = read.read(TEXTS)
        for row, text in enumerate(TEXTS):
            alone = read.read([text])
            close(together.tokens[row, : alone.tokens.shape[1]], alone.tokens[0])
            assert masked == (together.seen is not None)
            if masked:
                assert together.seen[row].sum() == alone.seen.sum() == min(read.tokens.counts([text])[0], read.sizes[1])
                assert not together.tokens[row, ~together.seen[row]].any()


@pytest.mark.parametrize("encoder", ["clip", "t5"])
@given(texts=st.lists(st.text("abc de", max_size=40), min_size=1, max_size=4))
@settings(max_examples=20)
def test_what_is_cut_is_counted_and_closed(folders, encoder, texts):
    tokens = tokens_of(TextEncoderConfig(model=folders[encoder], masked=True))
    ids, seen = tokens(texts)
    for count, row, there in zip(tokens.counts(texts), ids, seen, strict=True):
        kept = row[there]
        assert len(kept) == min(count, tokens.sizes.length)
        assert kept[-1] == {"clip": 3, "t5": 1}[encoder]


def test_bf16_is_near(folders):
    for folder in folders.values():
        exact, rounded = (
            TextEncoder(TextEncoderConfig(model=folder, precision=p)).read(TEXTS).tokens.float()
            for p in ("fp32", "bf16")
        )
        assert (exact - rounded).abs().mean() < 0.05 * exact.abs().mean()


def test_names_of_a_hub_may_have_a_folder():
    assert place_of("owner/name") == ("owner/name", {})
    assert place_of("owner/name/text_encoder") == ("owner/name", {"subfolder": "text_encoder"})
    assert place_of("./a/b/c") == ("./a/b/c", {})


def test_what_cannot_be_is_told(folders, tmp_path):
    with pytest.raises(ValueError, match="give a hub's name or a folder"):
        TextEncoderConfig()
    with pytest.raises(ValueError, match="neither is asked for"):
        TextEncoderConfig(model="a", tokens=False)
    with pytest.raises(FileNotFoundError, match="no text encoder at"):
        sizes_of(TextEncoderConfig(model=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="12 tokens at most, but length is 13"):
        sizes_of(TextEncoderConfig(model=folders["clip"], length=13))
    with pytest.raises(ValueError, match="3 layers, but layer is 4"):
        sizes_of(TextEncoderConfig(model=folders["t5"], layer=4))
    with pytest.raises(ValueError, match="no vector of a whole text"):
        sizes_of(TextEncoderConfig(model=folders["t5"], pooled="plain"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="type 'bert'"):
        sizes_of(TextEncoderConfig(model=str(tmp_path / "bert")))


def test_weights_that_lack_are_told(folders, tmp_path):
    transformers.AutoConfig.from_pretrained(folders["t5"]).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders["t5"]).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    held = load_file(f"{folders['t5']}/model.safetensors")
    save_file(
        {name: each for name, each in held.items() if "block.1" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        TextEncoder(TextEncoderConfig(model=str(tmp_path)))
