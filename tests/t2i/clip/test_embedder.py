"""A trained CLIP judges pictures by captions; ours stands where a published one does, and the other way round."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.clip import Clip
from t2i.chain import Link, paint
from t2i.clip.embedder import Embedder
from t2i.conditions.encoders import TextEncoder, TextEncoderConfig
from t2i.pixels import to_pixels
from t2i.protocol import Asked
from tests.captioner.test_scoring import clip  # noqa: F401 -- a fixture: CLIP with random weights, as published
from tests.t2i.clip import tiny
from tests.t2i.conditions import tiny as encoders
from tests.t2i.house import spot

TEXTS = [tiny.caption(row) for row in range(16)]
LONG = "red over blue " * 9


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The folder of a trained one."""
    folder, task = str(tmp_path_factory.mktemp("ours")), tiny.task()
    module, _ = spot.trained(task, steps=150, batch=32)
    task.export({"clip": module}, folder)
    return folder


@pytest.fixture(scope="module")
def embedder(ours):
    return Embedder(ours, batch=5)


def pictures(size=None):
    """Of rows that were not trained on, of several sizes."""
    return [tiny.picture(1000 * 16 + row, size) for row in range(16)]


def by_transformers(folder, images, texts):
    """The cosine of each picture and its text, as their users work it out."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    longest = model.config.text_config.max_position_embeddings
    read = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    fit = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = fit(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model(**read, pixel_values=pixels)
    return (found.image_embeds * found.text_embeds).sum(1)


def test_it_has_learned_which_is_which(embedder):
    images, texts = embedder.embed_images(pictures()), embedder.embed_texts(TEXTS)
    assert images.shape == texts.shape == (16, 16)
    assert (images @ texts.T).argmax(1).tolist() == list(range(16))


def test_what_is_kept_loads_as_any_clip(ours, embedder):
    texts = [*TEXTS[:15], LONG]
    wanted = by_transformers(ours, pictures(), texts)
    scores = embedder.score(pictures(), texts)
    torch.testing.assert_close(scores.cosines, wanted, rtol=0, atol=1e-5)
    assert scores.cut == [False] * 15 + [True]
    others = Clip(ours)  # the captioner's
    similarities = others.similarity(others.encode(pictures()), texts)
    assert similarities.values == pytest.approx(wanted.tolist(), abs=1e-5)
    assert similarities.cut == scores.cut
    features = TextEncoder(TextEncoderConfig(model=ours, pooled="projected", precision="fp32")).read(TEXTS)
    torch.testing.assert_close(
        normalize(features.pooled.float(), dim=1), embedder.embed_texts(TEXTS), rtol=0, atol=2e-2
    )


def test_a_published_one_is_judged_by_as_transformers_has_it(clip):  # noqa: F811
    folder = clip[1]
    found = Embedder(folder)
    assert (found.width, found.longest) == (16, 77)
    texts = [*TEXTS[:14], "", LONG * 5]
    torch.testing.assert_close(
        found.score(pictures(), texts).cosines, by_transformers(folder, pictures(), texts), rtol=0, atol=1e-5
    )
    assert sum(found.cut(texts)) == 1


def test_a_row_is_scored_alone(embedder):
    images, texts = pictures(), [*TEXTS[:15], LONG]
    together = embedder.score(images, texts).cosines
    alone = [float(embedder.score([image], [text]).cosines) for image, text in zip(images, texts, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)
    assert torch.equal(embedder.embed_images(images[::-1]).flip(0).argsort(), embedder.embed_images(images).argsort())
    assert embedder.embed_texts([]).shape == embedder.embed_images([]).shape == (0, 16)


def test_pictures_may_be_a_tensor(embedder):
    arrays = pictures(size=(20, 24))
    tensor = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(embedder.embed_images(tensor), embedder.embed_images(arrays), rtol=0, atol=1e-6)


class Colours:
    """A prior of whose four candidates the one at place `row % 4` is what row's caption says."""

    calls = 0

    def sample(self, asked, seeds, sampling, start=None):
        rows = [row if row % 4 == self.calls else (row + 5 * self.calls + 3) % 16 for row in range(len(seeds))]
        self.calls += 1
        arrays = np.stack([tiny.picture(row, (16, 16)) for row in rows])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1


def test_a_judge_keeps_the_better_candidate(embedder):
    def ask(told, seeds, negative, heard):
        return Asked(rows=len(seeds))

    shows = SimpleNamespace(decodes=True, decode=lambda values: values)
    link = Link(Colours(), ask, None, shows, id="pixels", candidates=4, judge=embedder.judge)
    drawn = paint([link], {"caption": TEXTS}, list(range(16))).pictures
    wanted = np.stack([tiny.picture(row, (16, 16)) for row in range(16)])
    assert np.array_equal(np.stack(to_pixels(drawn)), wanted)


def test_what_cannot_be_judged_is_said(embedder, tmp_path):
    with pytest.raises(ValueError, match="nothing decodes"):
        embedder.judge(torch.zeros(1, 2), None, {"caption": ["a"]})
    with pytest.raises(ValueError, match="no caption was told"):
        embedder.judge(torch.zeros(1, 2), torch.zeros(1, 3, 8, 8), {"class_label": ["a"]})
    with pytest.raises(ValueError, match="2 pictures and 1 texts"):
        embedder.score(pictures()[:2], ["a"])
    with pytest.raises(FileNotFoundError, match="There is no CLIP at"):
        Embedder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="type 't5'"):
        Embedder(encoders.t5(tmp_path / "t5"))


def test_weights_that_lack_are_told(ours, tmp_path):
    model = transformers.CLIPModel.from_pretrained(ours)
    transformers.AutoTokenizer.from_pretrained(ours).save_pretrained(tmp_path)
    CLIPImageProcessorPil.from_pretrained(ours).save_pretrained(tmp_path)
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("visual_projection")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights of CLIP, such as visual_projection\.weight"):
        Embedder(str(tmp_path))
