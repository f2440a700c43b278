import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.duplicates import MAX_DISTANCE, _masks, find_equal, find_near
from captioner.hashing import mean_colors, phash
from tests.infra.data.zoo import picture
from workflows.corpora.shapes import draw_scene, render


def brute_force(hashes, colors, distance, tolerance):
    first = []
    for row in range(len(hashes)):
        near = np.bitwise_count(hashes[: row + 1] ^ hashes[row]) <= distance
        alike = np.abs(colors[: row + 1].astype(int) - colors[row]).max(axis=1, initial=0) <= tolerance
        first.append(int(np.flatnonzero(near & alike)[0]))
    return first


def clustered(rng, rows, flips):
    """Hashes of which many lie within a few flipped bits of another."""
    hashes = rng.integers(0, 2**64, max(1, rows // 4), dtype=np.uint64)[rng.integers(0, max(1, rows // 4), rows)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << rng.integers(0, 64, rows, dtype=np.uint64)
    return hashes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 300), st.integers(0, MAX_DISTANCE), st.integers(0, 8), st.integers(0, 60))
def test_the_index_finds_what_brute_force_finds(seed, rows, distance, flips, tolerance):
    rng = np.random.default_rng(seed)
    hashes = clustered(rng, rows, flips)
    colors = rng.integers(0, 100, (rows, 2), dtype=np.uint8)
    assert find_near(hashes, colors, distance, tolerance).tolist() == brute_force(hashes, colors, distance, tolerance)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2**63, 2**64 - 1, 5, 4, 7]), max_size=40), st.integers(0, 4))
def test_the_index_finds_what_brute_force_finds_among_few_values(values, distance):
    hashes, colors = np.array(values, dtype=np.uint64), np.zeros((len(values), 1), dtype=np.uint8)
    assert find_near(hashes, colors, distance, 0).tolist() == brute_force(hashes, colors, distance, 0)


@pytest.mark.parametrize("rows", [10, 10**4, 10**6, 10**8])
@pytest.mark.parametrize("distance", [0, 1, 4, 7, MAX_DISTANCE])
def test_every_pair_within_the_distance_agrees_under_some_mask(rows, distance):
    rng = np.random.default_rng(rows + distance)
    masks = np.array(list(_masks(rows, distance)), dtype=np.uint64)
    for _ in range(50):
        flipped = np.uint64(sum(1 << int(bit) for bit in rng.permutation(64)[:distance]))
        assert np.any(masks & flipped == 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=50))
def test_equal_digests(values):
    digests = np.array(values, dtype=np.uint64).reshape(-1, 2)
    assert find_equal(digests).tolist() == [values.index(value) for value in values]


def test_a_chain_is_told_link_by_link():
    hashes = np.array([0b0, 0b11, 0b1111], dtype=np.uint64)
    assert find_near(hashes, np.zeros((3, 1), dtype=np.uint8), 2, 0).tolist() == [0, 0, 1]


def test_memory_is_a_constant_a_row_and_time_is_not_quadratic():
    rng = np.random.default_rng(0)
    rows = 200_000
    hashes, colors = rng.integers(0, 2**64, rows, dtype=np.uint64), np.zeros((rows, 48), dtype=np.uint8)
    hashes[rows // 2 :] = hashes[: rows // 2] ^ np.uint64(0b1011)
    hashes[:2000] = 1  # as blank pictures
    started = time.process_time()
    tracemalloc.start()
    first = find_near(hashes, colors, 4, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.all(first[rows // 2 + 2000 :] == np.arange(2000, rows // 2))
    assert np.all(first[:2000] == 0)
    assert peak < 60 * rows + 20 * 2**20
    assert time.process_time() - started < 30


def test_different_pictures_are_not_duplicates():
    rng = np.random.default_rng(1)
    noise = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(500)]
    smooth = [picture(seed) for seed in range(500)]
    assert not repeated(noise + smooth).any()


def test_colours_tell_drawings_apart_that_shades_do_not():
    scenes = list(dict.fromkeys(draw_scene(np.random.default_rng(seed)) for seed in range(400)))
    pictures = [render(scene, (32, 32)) for scene in scenes]
    assert repeated(pictures, tolerance=255).mean() > 0.3
    assert repeated(pictures).mean() < 0.12


def repeated(pictures, distance=4, tolerance=32):
    hashes = np.array([phash(one) for one in pictures], dtype=np.int64).view(np.uint64)
    colors = np.array([np.frombuffer(mean_colors(one), dtype=np.uint8) for one in pictures])
    return find_near(hashes, colors, distance, tolerance) < np.arange(len(pictures))
