"""A picture, its maps and its boxes come to a size together."""

import functools
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.data.fitting import check_fit, frame, nearest
from infra.data.images import decode, encode_png, measure
from tests.infra.data.zoo import encode, picture

sides = st.integers(1, 90)
sizes = st.tuples(sides, sides)
fits = st.sampled_from(["stretch", "crop", "pad"])


def show(pixels, size, fit, **options):
    return decode(encode_png(pixels), size, fit=fit, **options)


@given(sizes, sizes, fits)
def test_a_frame_lies_within_its_source_and_its_size(source, size, fit):
    shown = frame(source, size, fit)
    top, left, bottom, right = shown.box
    assert 0 <= top < bottom <= source[0]
    assert 0 <= left < right <= source[1]
    for place, inner, side in zip(shown.place, shown.inner, size, strict=True):
        assert inner >= 1
        assert 0 <= place <= side - inner
        assert abs(2 * place - (side - inner)) <= 1, "as much border on either side, or a pixel less"


@given(sizes, sizes)
def test_what_each_fit_keeps(source, size):
    stretched, cropped, padded = (frame(source, size, fit) for fit in ("stretch", "crop", "pad"))
    whole = (0, 0, *source)
    assert (stretched.box, stretched.inner) == (whole, size)
    # A crop has the aspect ratio of the size, the source's centre, and one of its sides.
    top, left, bottom, right = cropped.box
    assert (bottom - top) * size[1] == pytest.approx((right - left) * size[0])
    assert (top + bottom, left + right) == pytest.approx(source)
    assert (top, bottom) == (0, source[0]) or (left, right) == (0, source[1])
    assert cropped.inner == size
    # What is padded is whole, as large as it can be, and of the source's aspect ratio to half a pixel.
    assert padded.box == whole
    assert padded.inner[0] == size[0] or padded.inner[1] == size[1]
    scale = min(size[0] / source[0], size[1] / source[1])
    for inner, side in zip(padded.inner, source, strict=True):
        assert abs(inner - side * scale) <= 0.5 + 1e-9 or inner == 1


@given(sizes, st.integers(1, 5), fits)
def test_the_same_aspect_ratio_is_neither_cut_nor_padded(source, times, fit):
    assert frame(source, (source[0] * times, source[1] * times), fit) == frame(
        source, (source[0] * times, source[1] * times), "stretch"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), sizes, sizes, fits)
def test_what_has_its_size_stays_as_it_is(seed, source, size, fit):
    once = show(picture(seed, *source), size, fit)
    assert once.shape == (*size, 3)
    assert np.array_equal(show(once, size, fit), once)
    shown = frame(size, size, fit)
    numbers = np.arange(size[0] * size[1]).reshape(size)
    assert np.array_equal(shown.map(numbers), numbers)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), sizes, sizes)
def test_stretching_is_what_it_was_to_the_byte(seed, source, size):
    pixels = picture(seed, *source)
    before = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(show(pixels, size, "stretch"), np.asarray(before))


@pytest.mark.parametrize("stored", [(1200, 1600), (1999, 333), (120, 160)])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (10, 200)])
def test_stretching_a_jpeg_is_what_it_was_to_the_byte(stored, size):
    data = encode(picture(1, *stored), "JPEG", quality=95)
    image = Image.open(io.BytesIO(data))
    image.draft(None, (2 * max(size), 2 * max(size)))
    before = image.resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(decode(data, size), np.asarray(before))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.tuples(st.integers(40, 120), st.integers(40, 120)), sizes, fits)
def test_a_box_moves_with_the_picture_and_the_map(data, source, size, fit):
    top, left = (data.draw(st.integers(0, side - 8)) for side in source)
    bottom, right = (data.draw(st.integers(low + 8, side)) for low, side in zip((top, left), source, strict=True))
    pixels = np.zeros((*source, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    shown = frame(source, size, fit)
    boxes, kept = shown.boxes(np.array([[left, top, right, bottom]]))
    ys, xs = (np.arange(side) + 0.5 for side in size)

    def inside(margin):
        if not len(kept):
            return np.zeros(size, bool)
        x0, y0, x1, y1 = boxes[0] + np.array([-margin, -margin, margin, margin])
        return ((ys > y0) & (ys < y1))[:, None] & ((xs > x0) & (xs < x1))[None, :]

    # A map's pixel is set where its centre lies in the box; on the very edge either is right.
    mask = shown.map(pixels[..., 0] > 0, fill=False)
    assert mask.dtype == bool
    assert not (inside(-1e-6) & ~mask).any()
    assert not (mask & ~inside(1e-6)).any()
    # A picture's edges are soft: within a pixel of the edge, of the picture or of its copy, nothing is said.
    scale = [inner / (high - low) for inner, low, high in zip(shown.inner, shown.box[:2], shown.box[2:], strict=True)]
    margin = 2 + 2 * max(scale)
    seen = show(pixels, size, fit, background=(0, 0, 0))[..., 0] > 127
    assert not (inside(-margin) & ~seen).any()
    assert not (seen & ~inside(margin)).any()


@given(sizes, sizes, fits, st.integers(1, 4))
def test_a_map_of_another_resolution_is_shown_like_one_of_the_picture_s(source, size, fit, times):
    coarse = np.arange(source[0] * source[1]).reshape(source)
    fine = coarse.repeat(times, 0).repeat(times, 1)
    shown = frame(source, size, fit)
    same = shown.map(coarse, -1) == shown.map(fine, -1)
    # Where a centre falls on the edge of two values, either is the nearest.
    on_edge = [np.isclose(np.abs(c - np.round(c)), 0, atol=1e-6) for c in centres_in_source(shown)]
    assert (same | on_edge[0][:, None] | on_edge[1][None, :]).all()
    assert np.array_equal(shown.map(np.stack([fine, fine], -1), -1)[..., 1], shown.map(fine, -1))


def centres_in_source(shown):
    for axis in (0, 1):
        low, high = shown.box[axis], shown.box[axis + 2]
        centres = (np.arange(shown.size[axis]) + 0.5 - shown.place[axis]) / shown.inner[axis]
        yield low + centres * (high - low)


def test_a_map_and_a_picture_by_hand():
    numbers = np.arange(8).reshape(2, 4)
    assert frame((2, 4), (2, 2), "crop").map(numbers).tolist() == [[1, 2], [5, 6]]
    assert frame((2, 4), (4, 4), "pad").map(numbers, 9).tolist() == [[9] * 4, [0, 1, 2, 3], [4, 5, 6, 7], [9] * 4]
    assert frame((2, 4), (2, 2), "stretch").map(numbers).tolist() == [[1, 3], [5, 7]]
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(show(pixels, (2, 2), "crop"), pixels[:, 1:3])
    padded = show(pixels, (4, 4), "pad", background=(7, 8, 9))
    assert np.array_equal(padded[1:3], pixels)
    assert padded[0].tolist() == padded[3].tolist() == [[7, 8, 9]] * 4
    assert show(pixels, (4, 4), "pad")[0, 0].tolist() == [255, 255, 255]


def test_boxes_are_clipped_and_those_that_vanish_dropped():
    boxes = [[0, 0, 10, 10], [0, 0, 25, 10], [30, 5, 70, 15], [40, 3, 40, 9], [-9, -9, 200, 200]]
    found, kept = frame((20, 100), (20, 20), "crop").boxes(np.array(boxes))
    assert kept.tolist() == [2, 4], "the crop shows 40 to 60; a box without an area is none"
    assert found.tolist() == [[0, 5, 20, 15], [0, 0, 20, 20]]
    found, kept = frame((20, 100), (50, 50), "pad").boxes(np.array(boxes))
    assert kept.tolist() == [0, 1, 2, 4]
    assert found.tolist() == [[0, 20, 5, 25], [0, 20, 12.5, 25], [15, 22.5, 35, 27.5], [0, 20, 50, 30]]
    assert frame((2, 2), (2, 2), "pad").boxes(np.zeros((0, 4)))[0].shape == (0, 4)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("stored", [(1200, 1600), (1601, 1203), (400, 3000)])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_large_jpeg_is_fitted_as_if_it_had_been_decoded_whole(fit, stored, orientation):
    data = large(stored, orientation)
    decoded = decode(data)
    for size in ((48, 64), (64, 40)):
        whole = show(decoded, size, fit)
        assert np.abs(decode(data, size, fit=fit).astype(int) - whole).mean() < 2
    assert frame(measure(data), (48, 64), fit).source == decoded.shape[:2]


@functools.cache
def large(stored, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(1, *stored), "JPEG", quality=95, exif=exif)


def test_an_orientation_that_does_not_exist_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    data = encode(picture(0), "JPEG", exif=exif)
    assert measure(data) == decode(data).shape[:2] == (24, 40)


@given(sizes, st.lists(sizes, min_size=1, max_size=6, unique=True), st.randoms())
def test_the_nearest_bucket(source, buckets, random):
    chosen = nearest(source, buckets)
    random.shuffle(buckets)
    assert nearest(source, buckets) == chosen, "the order of the list means nothing"

    def distance(size):
        return abs(np.log(source[1] / source[0]) - np.log(size[1] / size[0]))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-12
    assert nearest(source[::-1], [one[::-1] for one in buckets])[::-1] == chosen or any(
        one != chosen and np.isclose(distance(one), distance(chosen)) for one in buckets
    ), "on its side a picture has the same bucket on its side"
    if source in buckets:
        assert chosen[0] * source[1] == chosen[1] * source[0]


@pytest.mark.parametrize(
    ("source", "buckets", "chosen"),
    [
        ((10, 10), [(64, 64), (32, 32)], (32, 32)),  # the same aspect ratio: the smaller
        ((10, 10), [(64, 32), (32, 65), (32, 64)], (32, 64)),  # as far on either side, as large: the lower
        ((10, 14), [(10, 10), (10, 20)], (10, 10)),  # by the quotient, 1.4 to 1.43: in differences it is 0.4 to 0.6,
        ((10, 145), [(10, 100), (10, 200)], (10, 200)),  # but here 4.5 to 5.5 is 1.45 to 1.38
        ((1, 8192), [(64, 64), (64, 128)], (64, 128)),
    ],
)
def test_nearest_is_by_quotient_and_ties_go_to_the_smaller(source, buckets, chosen):
    assert nearest(source, buckets) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("stretch", (0, 5), ()), "image_size is"),
        (("stretch", None, ((8, 9000),)), "A bucket is"),
        (("pad", None, ()), "give an image_size or buckets"),
        (("crop", (8, 8), ((8, 8),)), "with buckets it is None"),
        (("crop", None, ((8, 8), (8, 4), (8, 8))), "8x8 is given again"),
    ],
)
def test_a_fit_that_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        check_fit(*options)
