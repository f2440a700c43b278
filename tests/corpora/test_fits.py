"""How a picture comes to its size is a choice, and what belongs to it comes along."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from infra.data.images import decode
from tests.infra.data.zoo import encode, picture

BUCKETS = ("--buckets", "16", "16", "16", "32", "32", "16", "--image-size", "None")


def test_a_picture_of_a_buckets_size_stays_as_it_is(corpus):
    """Nerogar/OneTrainer#646: pictures that were cut to a bucket by hand are resized and cut into another one."""
    sizes = {"wide": (16, 32), "tall": (32, 16), "square": (16, 16)}
    pictures = {name: picture(number, *size) for number, (name, size) in enumerate(sizes.items())}
    corpus.put({f"{name}.png": encode(pixels) for name, pixels in pictures.items()})
    found = corpus.read(*BUCKETS, "--fit", "crop")
    assert found.column("bucket") == {"wide": "16x32", "tall": "32x16", "square": "16x16"}
    for name, copy in found.column("image").items():
        assert np.array_equal(decode(copy), pictures[name])


def test_a_small_square_is_a_square(corpus):
    """d8ahazard/sd_dreambooth_extension#1089: 512x512, where pictures of 768x768 are among them, becomes 384x768."""
    corpus.put({f"{side}.png": encode(picture(side, side, side)) for side in (8, 10, 12, 40)})
    words = ("--buckets", "24", "24", "12", "24", "16", "16", "--image-size", "None")
    for fit in ("crop", "pad", "stretch"):
        assert set(corpus.read(*words, "--fit", fit).column("bucket").values()) == {"16x16"}, "of squares the smaller"


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_cut_padded_or_stretched_as_was_chosen(corpus, fit):
    """devilismyfriend/StableTuner#70: what becomes of pictures that are not square, nobody can say or choose."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 200
    corpus.put({"a.png": encode(pixels)})
    shown = decode(corpus.read("--image-size", "16", "16", "--fit", fit).column("image")["a"])[..., 0].astype(int)
    if fit == "crop":
        assert (shown == 200).all()
    elif fit == "pad":
        assert (shown[:4] == 255).all()
        assert (shown[12:] == 255).all()
        assert np.abs(shown[4:12, 6:10] - 200).max() < 5
    else:
        assert np.abs(shown[:, 6:10] - 200).max() < 5
        assert shown[:, :2].max() < 5


def annotated(corpus, size, boxes, **files):
    boxes = [{"bbox": box, "label": label} for label, box in boxes.items()]
    corpus.put({"a.png": encode(picture(0, *size)), "a.json": json.dumps({"objects": boxes}), **files})


FIELDS = ("--conditions.boxes-field", "objects")


def test_a_box_is_clipped_to_what_is_shown_or_goes_with_its_class(corpus):
    """rwightman/efficientdet-pytorch#185: boxes reach beyond the picture that was cut, or lie wholly outside."""
    annotated(corpus, (16, 32), {"inside": [10, 2, 14, 6], "across": [4, 4, 12, 8], "outside": [26, 1, 31, 5]})
    found = corpus.read("--image-size", "16", "16", "--fit", "crop", *FIELDS)
    assert found.column("box_classes")["a"] == ["inside", "across"]
    boxes = np.array(found.column("boxes")["a"]) * 16
    assert np.allclose(boxes, [[2, 2, 6, 6], [0, 4, 4, 8]], atol=1e-4)


def test_a_border_moves_a_box_and_leaves_its_size(corpus):
    """albumentations-team/albumentations#1167: where borders are added, boxes grow."""
    annotated(corpus, (16, 32), {"dog": [8, 4, 16, 12]})
    found = corpus.read("--image-size", "32", "32", "--fit", "pad", *FIELDS)
    assert np.allclose(np.array(found.column("boxes")["a"]) * 32, [[8, 12, 16, 20]], atol=1e-4)


def test_a_mask_has_no_values_but_its_own(corpus):
    """tensorflow/docs#2159: a mask that was resized as pictures are holds labels that nobody gave."""
    labels = np.random.default_rng(0).choice([0, 1, 200], (33, 47)).astype(np.uint8)
    annotated(corpus, (33, 47), {}, **{"a.seg.png": encode(labels)})
    for fit in ("crop", "pad", "stretch"):
        found = corpus.read("--image-size", "16", "24", "--fit", fit, "--conditions.maps", "seg=seg.png")
        shown = np.asarray(Image.open(io.BytesIO(found.column("map_seg")["a"])))
        assert shown.shape == (16, 24)
        assert set(np.unique(shown)) <= {0, 1, 200}
