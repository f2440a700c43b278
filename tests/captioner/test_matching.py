import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BlipConfig, BlipForImageTextRetrieval
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from captioner.images import fit_images
from captioner.matching import Matching, MatchingConfig, _apart, _draw, _odds
from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.task import load_captioner, load_tower
from tests.captioner.conftest import CAPTIONS

pytestmark = pytest.mark.family()
BOTH = MatchingConfig(contrastive=1, match=1, width=16)
TEXTS = [*CAPTIONS, "a", "a yellow cross and a small circle", "two", "a large blue square at the bottom left"]


@pytest.fixture(scope="module")
def captioner(vocabulary):
    return make(vocabulary, BOTH)


def make(vocabulary, matching, std=0.4):
    config = CaptionerConfig(
        vision=VisionConfig(image_size=(16, 24), patch_size=8, hidden=64, layers=2, heads=4, mlp=128),
        text=TextConfig(hidden=64, layers=2, heads=4, mlp=128, max_length=24),
        init_std=std,
    )
    torch.manual_seed(0)
    return Captioner(config.blip(vocabulary), vocabulary, matching=matching).eval()


def make_batch(vocabulary, pixels, texts, weight=None):
    ids, mask = vocabulary.sequences(texts, "", 24)
    rng = np.random.default_rng(3)
    return {
        "pixels": pixels[: len(texts)],
        "weight": torch.ones(len(texts)) if weight is None else torch.tensor(weight),
        "ids_alt": torch.from_numpy(ids),
        "mask_alt": torch.from_numpy(mask),
        "draw_text": torch.from_numpy(rng.random(len(texts))),
        "draw_image": torch.from_numpy(rng.random(len(texts))),
    }


def test_batched_equals_single(captioner, pixels):
    with torch.no_grad():
        features = captioner.encode(pixels[:8])
    for judge in (captioner.matching.match, captioner.matching.similarity):
        together = judge(features, TEXTS)
        alone = [judge(features[i : i + 1], [text])[0] for i, text in enumerate(TEXTS)]
        assert together == pytest.approx(alone, abs=1e-5)
        assert np.std(together) > 0.02, "scores that do not vary would show nothing"


def test_this_model_would_show_padding_errors(captioner, pixels, monkeypatch):
    """The comparison above means something: where padding is attended to, scores change."""
    with torch.no_grad():
        features = captioner.encode(pixels[:8])
    right = captioner.matching.match(features, TEXTS)
    forward = captioner.matching.text_encoder.forward
    blind = lambda ids, attention_mask, **more: forward(ids, attention_mask=torch.ones_like(ids), **more)  # noqa: E731
    monkeypatch.setattr(captioner.matching.text_encoder, "forward", blind)
    assert np.abs(np.subtract(captioner.matching.match(features, TEXTS), right)).max() > 1e-3


def test_scores_have_their_ranges_and_none_stays_none(captioner, pixels):
    with torch.no_grad():
        features = captioner.encode(pixels[:4])
    texts = [None, "a red circle", "", None]
    match, similarity = captioner.matching.match(features, texts), captioner.matching.similarity(features, texts)
    for column in (match, similarity):
        assert [value is None for value in column] == [True, False, False, True]
    assert all(0 < value < 1 for value in match if value is not None)
    assert all(-1 <= value <= 1 for value in similarity if value is not None)
    assert captioner.matching.match(features, [None] * 4) == [None] * 4


def test_a_text_too_long_is_cut_not_refused(captioner, pixels):
    with torch.no_grad():
        features = captioner.encode(pixels[:1])
    assert captioner.matching.match(features, ["a red circle " * 50])[0] is not None


@pytest.mark.parametrize("missing", ["match", "contrastive"])
def test_a_part_of_weight_0_is_not_built(vocabulary, pixels, missing):
    captioner = make(vocabulary, MatchingConfig(**{"contrastive": 1, "match": 1, missing: 0}))
    names = {name for name, _ in captioner.matching.named_parameters()}
    parts = {"match": {"itm_head.weight"}, "contrastive": {"vision_proj.weight", "log_scale"}}
    assert not names & parts[missing]
    losses = captioner(make_batch(vocabulary, pixels, TEXTS))
    assert missing not in losses
    assert losses.keys() == captioner.targets(make_batch(vocabulary, pixels, TEXTS)).keys()
    judge = captioner.matching.match if missing == "match" else captioner.matching.similarity
    with pytest.raises(ValueError, match=missing):
        judge(captioner.encode(pixels[:1]), ["a"])


def test_without_it_a_captioner_is_as_before(vocabulary, pixels):
    plain, matched = make(vocabulary, None), make(vocabulary, BOTH)
    assert make(vocabulary, MatchingConfig()).matching is None
    assert plain.state_dict().keys() == {name for name in matched.state_dict() if not name.startswith("matching")}
    assert all(torch.equal(tensor, matched.state_dict()[name]) for name, tensor in plain.state_dict().items())
    batch = make_batch(vocabulary, pixels, TEXTS)
    assert set(plain(batch)) == {"alt"}
    assert plain(batch)["alt"].item() == matched(batch)["alt"].item()


def test_the_contrastive_loss_is_infonce(captioner, vocabulary, pixels):
    batch = make_batch(vocabulary, pixels, TEXTS)
    with torch.no_grad():
        loss = float(captioner(batch)["contrastive"])
        features = captioner.encode(batch["pixels"])
        cosines = [captioner.matching.similarity(features, [text] * len(TEXTS)) for text in TEXTS]
    logits = torch.tensor(cosines).T / BOTH.temperature  # image by text
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).sum() / 2
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_match_loss_is_of_a_right_pair_and_two_wrong_ones(captioner, vocabulary, pixels):
    batch = make_batch(vocabulary, pixels, TEXTS)
    with torch.no_grad():
        loss = float(captioner(batch)["match"])
        features = captioner.encode(batch["pixels"])
        shown = captioner.matching.gather(captioner.matching.survey(features, {**batch, "ids": batch["ids_alt"]}))
        wrong_text, wrong_image = captioner.matching._negatives(shown)
    assert (wrong_text != torch.arange(8)).all()
    assert (wrong_image != torch.arange(8)).all()
    expected = 0.0
    for row, text in enumerate(TEXTS):
        expected -= math.log(captioner.matching.match(features[row : row + 1], [text])[0])
        expected -= math.log(1 - captioner.matching.match(features[row : row + 1], [TEXTS[wrong_text[row]]])[0])
        other = int(wrong_image[row])
        expected -= math.log(1 - captioner.matching.match(features[other : other + 1], [text])[0])
    assert loss == pytest.approx(expected / 3, rel=1e-4)


def test_padding_and_twins_are_nobodys_negative(captioner, vocabulary, pixels):
    """Rows of weight 0 change nothing, and one text under two images makes no wrong pair."""
    texts = [*TEXTS[:5], TEXTS[0]]
    with torch.no_grad():
        clean = captioner(make_batch(vocabulary, pixels, texts))
        batch = make_batch(vocabulary, pixels, [*texts, *TEXTS[5:8]], weight=[1.0] * 6 + [0.0] * 3)
        batch["draw_text"][:6] = make_batch(vocabulary, pixels, texts)["draw_text"]
        batch["draw_image"][:6] = make_batch(vocabulary, pixels, texts)["draw_image"]
        padded = captioner(batch)
        ids = batch["ids_alt"]
    assert {name: float(value) for name, value in padded.items()} == pytest.approx(
        {name: float(value) for name, value in clean.items()}, rel=1e-5
    )
    apart = _apart({"ids": ids, "weight": batch["weight"]})
    assert not apart[0, 5]
    assert not apart[6:].any()
    assert not apart[:, 6:].any()
    assert apart[0, 1:5].all()


def test_a_batch_without_wrong_pairs_still_trains(captioner, vocabulary, pixels):
    losses = captioner(make_batch(vocabulary, pixels, ["a red circle"] * 3))
    assert losses["contrastive"].item() == pytest.approx(0, abs=1e-6)
    losses["match"].backward()
    assert all(torch.isfinite(p.grad).all() for p in captioner.parameters() if p.grad is not None)
    captioner.zero_grad()


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_draws_fall_on_allowed_columns(size, seed, draw, hard):
    generator = torch.Generator().manual_seed(seed)
    alike = (50 * torch.randn(size, size, generator=generator)).double()
    apart = torch.rand(size, size, generator=generator) < 0.5
    odds = _odds(alike, apart, hard)
    assert torch.allclose(odds.sum(1), apart.any(1).double())
    chosen = _draw(odds, torch.full((size,), draw, dtype=torch.float64))
    for row, column in enumerate(chosen.tolist()):
        assert (column == -1) == (not apart[row].any())
        assert column == -1 or apart[row, column]


@pytest.mark.parametrize(("hard", "shares"), [(1, [0, 0.25, 0.75]), (0, [0, 0.5, 0.5]), (0.6, [0, 0.35, 0.65])])
def test_draws_follow_likeness_and_chance(hard, shares):
    alike = torch.log(torch.tensor([[0.6, 0.1, 0.3]], dtype=torch.float64)).expand(10_000, 3)
    apart = torch.tensor([[False, True, True]]).expand(10_000, 3)
    chosen = _draw(_odds(alike, apart, hard), torch.from_numpy((np.arange(10_000) + 0.5) / 10_000))
    assert (torch.bincount(chosen, minlength=3) / 10_000).tolist() == pytest.approx(shares, abs=1e-3)


def test_save_and_load(captioner, pixels, tmp_path):
    captioner.save(str(tmp_path))
    loaded = Captioner.load(str(tmp_path))
    assert loaded.matching.config == BOTH
    with torch.no_grad():
        features = captioner.encode(pixels[:8])
    assert loaded.matching.match(features, TEXTS) == captioner.matching.match(features, TEXTS)
    assert loaded.matching.similarity(features, TEXTS) == captioner.matching.similarity(features, TEXTS)


@pytest.fixture(scope="module")
def published(vocabulary, tmp_path_factory):
    """A small retrieval BLIP with random weights: as published, its tokenizer lacks the last two of its tokens."""
    torch.manual_seed(3)
    folder = str(tmp_path_factory.mktemp("retrieval"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": vocabulary.bos, "sep_token_id": vocabulary.sep, "pad_token_id": vocabulary.pad}
    text = {"vocab_size": len(vocabulary) + 2, "max_position_embeddings": 32, "initializer_range": 0.2, **ids, **sizes}
    vision = {"image_size": 32, "patch_size": 8, "initializer_range": 0.2, **sizes}
    blip = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24))
    blip.itm_head.weight.data.normal_(std=0.2)
    blip.eval().save_pretrained(folder)
    vocabulary.save(folder)
    return blip, folder


@pytest.mark.parametrize("saved_again", [False, True])
def test_published_retrieval_weights_score_as_in_transformers(published, vocabulary, pixels, tmp_path, saved_again):
    blip, folder = published
    captioner = Captioner.load(folder)
    assert list(captioner.decoders) == []
    assert captioner.matching.enc == len(vocabulary) + 1
    if saved_again:
        captioner.save(str(tmp_path))
        captioner = Captioner.load(str(tmp_path))
    images = [image.numpy() for image in pixels[:8]]
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    theirs_pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    ids = torch.from_numpy(vocabulary.sequences(TEXTS, "", 32)[0])
    mask = (ids != vocabulary.pad).long()
    features = captioner.encode(torch.from_numpy(fit_images(images, captioner.image_size))).detach()
    with torch.no_grad():
        ids[:, 0] = captioner.matching.enc
        matched = blip(ids, theirs_pixels, attention_mask=mask).itm_score.softmax(-1)[:, 1]
        ids[:, 0] = vocabulary.cls
        cosines = blip(ids, theirs_pixels, attention_mask=mask, use_itm_head=False).itm_score.diagonal()
    assert captioner.matching.match(features, TEXTS) == pytest.approx(matched.tolist(), abs=1e-4)
    assert captioner.matching.similarity(features, TEXTS) == pytest.approx(cosines.tolist(), abs=1e-4)
    assert matched.std() > 0.02


def test_retrieval_weights_are_no_captioner(published):
    assert load_tower(published[1]).matching is not None
    with pytest.raises(ValueError, match="speaks none"):
        load_captioner(published[1])


def test_a_halved_checkpoint_is_refused(published, tmp_path):
    blip, _ = published
    weights = {name: tensor for name, tensor in blip.state_dict().items() if not name.startswith("itm_head")}
    blip.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"itm_head\.bias"):
        Captioner.load(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"match": -1}, "negative"),
        ({"contrastive": -0.5}, "negative"),
        ({"hard": 1.5}, "hard"),
        ({"width": 0}, "width"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_configs_check_themselves(values, message):
    with pytest.raises(ValueError, match=message):
        MatchingConfig(**values)


def test_gather_sees_no_gradient(captioner, vocabulary, pixels):
    shown = {}
    alone = captioner.matching.gather

    def spy(columns):
        shown.update(columns)
        return alone(columns)

    captioner.matching.gather = spy
    try:
        captioner(make_batch(vocabulary, pixels, TEXTS))
    finally:
        captioner.matching.gather = alone
    assert shown
    assert not any(column.requires_grad for column in shown.values())
    assert isinstance(captioner.matching, Matching)
