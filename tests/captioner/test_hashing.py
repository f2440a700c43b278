from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from captioner.hashing import mean_colors, phash
from infra.data.images import decode
from tests.infra.data.zoo import encode, picture

# imagehash.phash of zoo pictures (imagehash 4.3.2, scipy 1.17.1, Pillow 13.0).
IMAGEHASH = {
    0: "e52565519b596959",
    1: "b1991b6de56551a4",
    2: "a438ad8b538fa53a",
    3: "9b641b9be49a1a3a",
    4: "ce708e8c788c8c7f",
    5: "9b6cce8c318cc3ec",
}


def bits_apart(one, other):
    return ((one ^ other) & (2**64 - 1)).bit_count()


@pytest.mark.parametrize("seed", IMAGEHASH)
def test_the_bits_are_those_of_imagehash(seed):
    assert f"{phash(picture(seed)) & (2**64 - 1):016x}" == IMAGEHASH[seed]


def test_a_wave_sets_the_bit_of_its_frequency():
    """The DCT of a basis function has one coefficient, so that its bit and the mean's are set."""
    n = np.arange(32)
    wave = np.cos(np.pi * 3 * (2 * n + 1) / 64)[:, None] * np.cos(np.pi * 5 * (2 * n + 1) / 64)[None, :]
    grey = np.round(128 + 100 * wave).astype(np.uint8)
    bits = phash(np.repeat(grey[..., None], 3, axis=2)) & (2**64 - 1)
    assert bits >> 63 == 1  # row 0, column 0
    assert bits >> (63 - (3 * 8 + 5)) & 1 == 1  # row 3, column 5


def test_noise_is_about_32_bits_apart():
    rng = np.random.default_rng(0)
    hashes = [phash(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(60)]
    apart = [bits_apart(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert abs(np.mean(apart) - 32) < 1
    assert min(apart) > 10
    assert all(-(2**63) <= value < 2**63 for value in hashes)
    assert {value < 0 for value in hashes} == {True}  # the mean lies above the median, and its bit is the sign


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (1, 2, 3), (200, 10, 90)])
def test_plain_pictures_have_one_hash_whatever_their_size(color):
    hashes = {phash(np.full((*size, 3), color, dtype=np.uint8)) for size in [(1, 1), (7, 900), (333, 2), (64, 64)]}
    assert hashes == {0 if color == (0, 0, 0) else -(2**63)}


def photo(seed, height=120, width=200):
    """Noise with the spectrum of photographs, whose amplitudes fall as 1/f."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None] * height / width, np.fft.fftfreq(width)[None, :])
    f[0, 0] = 1
    spectrum = np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1)) / f[..., None]
    values = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return (128 + 40 * values / values.std()).clip(0, 230).astype(np.uint8)


def changes(array):
    image = Image.fromarray(array)
    height, width = array.shape[:2]
    yield "png", decode(encode(array))
    yield "jpeg", decode(encode(array, "JPEG", quality=50))
    yield "webp", decode(encode(array, "WEBP", quality=50))
    yield "half", np.asarray(image.resize((width // 2, height // 2), Image.Resampling.BICUBIC))
    yield "wide", np.asarray(image.resize((width * 2, height), Image.Resampling.BICUBIC))
    yield "cropped", array[height // 100 : height - height // 100, width // 100 : width - width // 100]
    yield "bright", np.asarray(ImageEnhance.Brightness(image).enhance(1.1))
    yield "dark", np.asarray(ImageEnhance.Brightness(image).enhance(0.9))


def test_copies_are_near_and_other_pictures_are_far():
    pictures = [photo(seed) for seed in range(40)]
    hashes = [phash(one) for one in pictures]
    apart = [bits_apart(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(apart) > 4
    missed = [
        name
        for one, own in zip(pictures, hashes, strict=True)
        for name, changed in changes(one)
        if bits_apart(phash(changed), own) > 4
    ]
    counts = Counter(missed)
    assert set(counts) <= {"cropped", "bright", "dark"}
    assert all(count <= 0.1 * len(pictures) for count in counts.values()), counts


def test_mean_colors_are_means():
    array = picture(3, 40, 80)
    expected = array.reshape(4, 10, 4, 20, 3).mean(axis=(1, 3))
    found = np.frombuffer(mean_colors(array), dtype=np.uint8).reshape(4, 4, 3)
    assert np.abs(found - expected).max() <= 1
    assert len(mean_colors(np.zeros((1, 1, 3), dtype=np.uint8))) == 48
