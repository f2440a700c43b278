"""CLIP scores and ranks of embeddings, by hand and by torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate

from t2i.evaluate import alignment
from t2i.evaluate.alignment import clip_score, retrieval

IMAGES, TEXTS = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([[1, 0.1], [0.2, 1], [0.5, 0.6]])


def noisy(n=30, width=8, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, width))
    return images, images + noise * rng.normal(size=(n, width))


def test_clip_score_in_closed_form():
    cosines = [1 / np.hypot(1, 0.1), 1 / np.hypot(0.2, 1), 1.1 / np.hypot(0.5, 0.6) / np.sqrt(2)]
    assert clip_score(IMAGES, TEXTS).value == pytest.approx(100 * np.mean(cosines))
    assert clip_score(3 * IMAGES, 0.1 * TEXTS).value == pytest.approx(100 * np.mean(cosines))
    assert clip_score(IMAGES, -IMAGES).value == 0


def test_retrieval_by_hand():
    found = retrieval(np.eye(3), np.array([[1, 0, 0], [1, 0.5, 0], [0, 0, 1]]), ks=(1, 2))
    assert found["text_r@1"].value == 1
    assert found["image_r@1"].value == 2 / 3  # the second text is nearest to the first picture
    assert found["image_r@2"].value == 1


@pytest.mark.parametrize("k", [1, 3, 7])
def test_ranks_are_those_of_torchmetrics(k):
    images, texts = noisy()
    near = torch.from_numpy(images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1))
    right = torch.eye(len(images), dtype=torch.bool)
    for name, lines in (("text", near), ("image", near.T)):
        hits = [float(retrieval_hit_rate(line, own, top_k=k)) for line, own in zip(lines, right, strict=True)]
        assert retrieval(images, texts, ks=(k,))[f"{name}_r@{k}"].value == pytest.approx(np.mean(hits))


def test_more_are_found_among_more():
    found = retrieval(*noisy(noise=2), ks=(1, 2, 4, 8, 16, 30))
    values = [found[f"text_r@{k}"].value for k in (1, 2, 4, 8, 16, 30)]
    assert values == sorted(values)
    assert values[-1] == 1
    for each in found.values():
        assert each.interval[0] <= each.value <= each.interval[1]


def test_order_does_not_matter():
    images, texts = noisy()
    order = np.random.default_rng(1).permutation(30)
    assert retrieval(images[order], texts[order])["text_r@1"].value == retrieval(images, texts)["text_r@1"].value


def test_nothing_is_found_by_chance_of_order():
    same = np.ones((10, 4))
    assert {each.value for each in retrieval(same, same, ks=(1, 9)).values()} == {0}
    assert retrieval(same, same, ks=(10,))["text_r@10"].value == 1


def test_pictures_of_one_caption_share_its_texts():
    images, texts = np.eye(3), np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert retrieval(images, texts, ks=(1,))["text_r@1"].value == 1 / 3  # two texts are as near as each other
    keyed = retrieval(images, texts, ["a", "a", "b"], ["a", "a", "b"], ks=(1,))
    assert keyed["image_r@1"].value == 1
    several = retrieval(np.eye(2), np.repeat(np.eye(2), 5, axis=0), [0, 1], [0] * 5 + [1] * 5, ks=(1,))
    assert (several["text_r@1"].value, several["text_r@1"].n, several["image_r@1"].n) == (1, 2, 10)


def test_blocks_change_nothing(monkeypatch):
    whole = retrieval(*noisy())
    monkeypatch.setattr(alignment, "BLOCK", 4)
    assert retrieval(*noisy()) == whole


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="Each picture has its text"):
        clip_score(IMAGES, TEXTS[:2])
    with pytest.raises(ValueError, match="0 keys in common"):
        retrieval(IMAGES, TEXTS, [1, 2, 3], [4, 5, 6])
    with pytest.raises(ValueError, match="3 rows with 2 keys"):
        retrieval(IMAGES, TEXTS, [1, 2])
    with pytest.raises(ValueError, match="not 0"):
        clip_score(np.zeros((3, 2)), TEXTS)
