import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioner.decoding import caption
from captioner.images import fit_images
from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig, from_pretrained
from captioner.styles import Style
from tests.captioner.conftest import CAPTIONS

pytestmark = pytest.mark.family()


def make_batch(vocabulary, pixels, texts, style="alt", prompt=""):
    ids, mask = vocabulary.sequences(texts, prompt, 24)
    batch = {f"ids_{style}": torch.from_numpy(ids), f"mask_{style}": torch.from_numpy(mask)}
    return {"pixels": pixels[: len(texts)], "weight": torch.ones(len(texts)), **batch}


def test_images_are_high_by_wide(make_captioner, pixels):
    captioner = make_captioner((16, 24))
    assert captioner.image_size == (16, 24)
    features = captioner.encode(pixels)
    assert features.shape == (14, 1 + 2 * 3, 64)
    assert captioner.vision.embeddings.position_embedding.shape[1] == 7
    with pytest.raises(AssertionError):
        captioner.encode(pixels.transpose(1, 2))


def test_every_patch_has_its_own_position(make_captioner):
    grey = torch.full((1, 16, 24, 3), 128, dtype=torch.uint8)
    patches = make_captioner((16, 24)).encode(grey)[0, 1:]
    assert torch.cdist(patches, patches).fill_diagonal_(1).min() > 1e-3


def test_the_loss_is_that_of_each_caption_alone(make_captioner, vocabulary, pixels):
    captioner = make_captioner()
    together = make_batch(vocabulary, pixels, CAPTIONS, prompt="a small")
    alone = [make_batch(vocabulary, pixels[i : i + 1], [text], prompt="a small") for i, text in enumerate(CAPTIONS)]
    sums = [float(captioner(batch)["alt"]) for batch in alone]
    assert float(captioner(together)["alt"]) == pytest.approx(sum(sums), rel=1e-5)
    assert float(captioner.targets(together)["alt"]) == sum(len(ids) + 1 for ids in vocabulary.encode(CAPTIONS))
    together["weight"][1:] = 0
    assert float(captioner(together)["alt"]) == pytest.approx(sums[0], rel=1e-5)
    assert float(captioner.targets(together)["alt"]) == len(vocabulary.encode(CAPTIONS[:1])[0]) + 1


def test_the_loss_is_plain_cross_entropy_after_the_prompt(make_captioner, vocabulary, pixels):
    captioner = make_captioner()
    prompt, words = vocabulary.encode(["a small", "blue square"])
    ids = torch.tensor([[vocabulary.bos, *prompt, *words, vocabulary.sep]])
    logp = captioner.logits("alt", captioner.encode(pixels[:1]), ids).log_softmax(-1)[0]
    expected = -sum(float(logp[position - 1, ids[0, position]]) for position in (3, 4, 5))
    batch = make_batch(vocabulary, pixels, ["blue square"], prompt="a small")
    assert float(captioner(batch)["alt"]) == pytest.approx(expected, rel=1e-5)


def test_branches_start_as_the_base_and_leave_it_alone(make_captioner, vocabulary, pixels):
    captioner = make_captioner().train()
    captioner.branch(["short", "descriptive"])
    batch = make_batch(vocabulary, pixels, CAPTIONS, "short") | make_batch(vocabulary, pixels, CAPTIONS, "descriptive")
    losses = captioner(batch)
    assert set(losses) == set(captioner.targets(batch)) == {"short", "descriptive"}
    assert losses["short"].item() == losses["descriptive"].item()
    sum(losses.values()).backward()
    for name, parameter in captioner.named_parameters():
        trained = name.startswith(("decoders.short", "decoders.descriptive"))
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None) == trained, name


def test_encoding_is_done_once_for_all_styles(make_captioner, vocabulary, pixels, monkeypatch):
    captioner = make_captioner(decoders=("alt", "short"))
    calls = []
    monkeypatch.setattr(captioner, "encode", lambda images, encode=captioner.encode: calls.append(1) or encode(images))
    batch = make_batch(vocabulary, pixels, CAPTIONS, "short") | make_batch(vocabulary, pixels, CAPTIONS, "alt")
    captioner(batch)
    assert calls == [1]


def test_save_and_load(make_captioner, vocabulary, pixels, tmp_path):
    captioner = make_captioner(decoders=("alt", "short"))
    captioner.styles = (Style(name="short", prompt="a", max_tokens=9),)
    captioner.save(str(tmp_path))
    loaded = Captioner.load(str(tmp_path))
    assert loaded.styles == captioner.styles
    assert loaded.image_size == (16, 24)
    ids = torch.from_numpy(vocabulary.sequences(CAPTIONS, "", 24)[0])
    features = loaded.encode(pixels[:4])
    assert torch.equal(features, captioner.encode(pixels[:4]))
    for name in ("alt", "short"):
        assert torch.equal(loaded.logits(name, features, ids), captioner.logits(name, features, ids))
        decoder = loaded.decoders[name]
        assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight


@pytest.fixture(autouse=True)
def keep_no_gradients(request):
    with torch.set_grad_enabled("branches" in request.node.name):
        yield


@pytest.fixture
def published(vocabulary, tmp_path):
    """A small BLIP with random weights, saved as published ones are."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": vocabulary.bos, "sep_token_id": vocabulary.sep, "pad_token_id": vocabulary.pad}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 32, "initializer_range": 0.2, **ids, **sizes}
    vision = {"image_size": 32, "patch_size": 8, "initializer_range": 0.2, **sizes}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, label_smoothing=0.1)).eval()
    blip.save_pretrained(tmp_path)
    vocabulary.save(str(tmp_path))
    return blip, str(tmp_path)


def transformers_pixels(images):
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    return processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a large red"])
def test_published_weights_caption_as_in_transformers(published, vocabulary, prompt, beams):
    blip, folder = published
    captioner = from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 40, 3), dtype=np.uint8) for i in range(5)]
    pixel_values = transformers_pixels(images)
    prefix = [vocabulary.bos, *vocabulary.encode([prompt])[0]]
    generated = blip.generate(
        pixel_values,
        input_ids=torch.tensor([[*prefix, vocabulary.sep]] * 5),
        attention_mask=torch.ones(5, len(prefix) + 1, dtype=torch.long),
        max_new_tokens=12,
        min_new_tokens=2,
        num_beams=beams,
        do_sample=False,
    )
    expected = vocabulary.decode([row[len(prefix) :] for row in generated.tolist()])
    features = captioner.encode(torch.from_numpy(fit_images(images, captioner.image_size)))
    with torch.no_grad():
        theirs = blip.vision_model(pixel_values).last_hidden_state
    assert torch.allclose(features, theirs, atol=1e-4)
    style = Style(name="short", prompt=prompt, min_tokens=2, max_tokens=12, beams=beams)
    assert caption(captioner, features, style).texts == expected
    assert len(set(expected)) > 1


def test_published_weights_give_the_same_logits(published, vocabulary, pixels):
    blip, folder = published
    captioner = Captioner.load(folder)
    images = fit_images([image.numpy() for image in pixels], captioner.image_size)
    ids = torch.from_numpy(vocabulary.sequences(CAPTIONS, "", 24)[0])
    with torch.no_grad():
        ours = captioner.logits("alt", captioner.encode(torch.from_numpy(images[:4])), ids)
        theirs = blip(transformers_pixels(images[:4]), ids).logits
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_what_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no captioner"):
        Captioner.load(str(tmp_path / "nothing"))
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'bert'"):
        Captioner.load(str(tmp_path))


def test_a_retrieval_checkpoint_is_refused(published, tmp_path):
    blip, _ = published
    folder = tmp_path / "halved"
    weights = {name: tensor for name, tensor in blip.state_dict().items() if name.startswith("vision")}
    blip.save_pretrained(folder, state_dict=weights)
    with pytest.raises(ValueError, match="weights of a BLIP captioner"):
        from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(image_size=(30, 32)), "whole patches"),
        (lambda: VisionConfig(hidden=130), "heads"),
        (lambda: TextConfig(hidden=100, heads=8), "heads"),
        (lambda: TextConfig(max_length=2), "room"),
        (lambda: CaptionerConfig(init_std=0), "init_std"),
        (lambda: Style(name="two words"), "plain word"),
        (lambda: Style(name="short", min_tokens=9, max_tokens=4), "ordered"),
        (lambda: Style(name="short", beams=0), "beams"),
    ],
)
def test_configs_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_same_weights_are_the_same_bytes(make_captioner, tmp_path):
    """Provenance names weights by the hash of their file."""
    captioner, found = make_captioner(decoders=("alt", "short", "descriptive")), set()
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        captioner.save(str(tmp_path / str(number)))
        found.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(found) == 1
    again = Captioner.load(str(tmp_path / "0"))
    ours, theirs = captioner.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    head = again.decoders["short"]
    assert head.cls.predictions.decoder.weight is head.bert.embeddings.word_embeddings.weight
