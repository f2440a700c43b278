"""Keyed random numbers: the reference generator, the laws of chance, and that nothing but the words enters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.train.draw import _mix
from t2i.random import bits, child, keys_of, normals, permutations, uniforms

KEYS = keys_of(range(64))
EACH = KEYS.repeat_interleave(1000)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def kolmogorov(sorted_N: torch.Tensor) -> float:
    """sqrt(N) D of sorted numbers that should be uniform: above 1.95 once in a thousand times."""
    count = len(sorted_N)
    above = torch.arange(1, count + 1) / count - sorted_N
    return math.sqrt(count) * float(torch.maximum(above, 1 / count - above).max())


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """sqrt(N) times the correlation of two draws: N(0, 1) where there is none."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1]) * math.sqrt(len(a))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 7, 64, 3 * 2**13 + 5])
def test_words_are_those_of_splitmix64(device, count):
    """NumPy's uint64 is the reference: sizes that fill vectors and blocks, and such that do not."""
    drawn = bits(keys_of([-5, 2**40], device), count, "salt", 3).cpu()
    for key, words in zip((-5, 2**40), drawn, strict=True):
        start = child(keys_of([key]), "salt", 3).numpy().view(np.uint64) ^ np.uint64(0xD1B54A32D192ED03)
        start = _mix(start)
        place = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        assert np.array_equal(words.numpy().view(np.uint64), _mix(start + place))


def test_splitmix64_is_the_published_one():
    """The first words of seed 1234567, as the reference code prints them."""
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert _mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_stay_what_they_are():
    """Trainings continue, and pictures are drawn again: no version may change a draw."""
    assert bits(keys_of([0, 7]), 1, "noise").flatten().tolist() == [8828817275213825892, 2898406224325083808]
    assert child(keys_of([0]), "noise", 1, 2).item() == -4348941874349997439


@given(st.permutations(range(12)), st.integers(1, 12), st.sampled_from([uniforms, normals]))
def test_neither_order_nor_batch_enters(order, size, draw):
    whole = draw(KEYS[:12], (3, 5), "salt", KEYS[:12], 4)
    for start in range(0, 12, size):
        part = torch.tensor(order[start : start + size])
        assert torch.equal(draw(KEYS[part], (3, 5), "salt", KEYS[part], 4), whole[part])


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_a_number_does_not_depend_on_how_many_are_drawn(few, many):
    few, many = sorted((few, many))
    for draw in (uniforms, normals):
        assert torch.equal(draw(KEYS[:1], (few,), "salt"), draw(KEYS[:1], (many,), "salt")[:, :few])


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_a_place_may_be_a_number_or_one_a_row(key, place):
    keys = keys_of([key, key + 1])
    everywhere = torch.full((2,), place)
    assert torch.equal(child(keys, "s", place, 2), child(keys, "s", everywhere, 2))
    assert torch.equal(child(keys, "s", 2, place), child(keys, "s", 2, everywhere))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_uniform(dtype):
    drawn = uniforms(KEYS, (4000,), "uniform", dtype=dtype).double()
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert kolmogorov(drawn.flatten().sort().values) < 1.95
    assert float((drawn - 0.5).mean()) * math.sqrt(12 * drawn.numel()) == pytest.approx(0, abs=4)


def test_normals_are_normal():
    drawn = normals(KEYS, (8001,), "normal", dtype=torch.float64)
    count = drawn.numel()
    assert kolmogorov(torch.special.ndtr(drawn).flatten().sort().values) < 1.95
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found = float(drawn.pow(power).mean())
        assert found == pytest.approx(moment, abs=4 * math.sqrt(spread / count)), power
    pairs = drawn[:, :8000].reshape(-1, 2)  # cosine and sine of one word
    assert abs(correlation(pairs[:, 0], pairs[:, 1])) < 4
    assert abs(correlation(pairs[:, 0] ** 2, pairs[:, 1] ** 2)) < 4
    assert 4.3 < float(drawn.abs().max()) < 6.7


def test_every_bit_is_a_coin_and_no_two_hang_together():
    words = bits(KEYS, 1024, "coins").flatten()
    coins = ((words[:, None] >> torch.arange(64)) & 1).double() * 2 - 1
    count = len(words)
    assert float(coins.mean(0).abs().max()) * math.sqrt(count) < 4.5  # of 64
    together = coins.T @ coins / math.sqrt(count)
    assert float((together - torch.diag(together.diag())).abs().max()) < 5  # of 2016


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: bits(KEYS, 1000, "a"), lambda: bits(KEYS + 1, 1000, "a")),
        (lambda: bits(KEYS, 1000, "a", 0), lambda: bits(KEYS, 1000, "a", 1)),
        (lambda: bits(KEYS, 1000, "a", 1, 0), lambda: bits(KEYS, 1000, "a", 0, 1)),
        (lambda: bits(KEYS, 1000, "a"), lambda: bits(KEYS, 1000, "b")),
        (lambda: bits(KEYS, 1000, "a")[:, 1:], lambda: bits(KEYS, 1000, "a")[:, :-1]),
        (lambda: bits(KEYS, 1000, "a"), lambda: bits(child(KEYS, "a"), 1000, "a")),
        (lambda: bits(~KEYS * 2**32, 1000, "a"), lambda: bits(~KEYS * 2**33, 1000, "a")),
        (lambda: bits(KEYS, 1000, "a"), lambda: child(EACH, "a", torch.arange(1000).repeat(64))),
    ],
    ids=["keys", "places", "order", "salts", "words", "children", "high keys", "children as places"],
)  # fmt: skip
def test_neighbours_are_unrelated(one, other):
    one, other = one().flatten(), other().flatten()
    changed = ((one[:, None] ^ other[:, None]) >> torch.arange(64)) & 1
    assert abs(float(changed.double().mean()) - 0.5) * 2 * math.sqrt(changed.numel()) < 4
    assert float((changed.double().mean(0) - 0.5).abs().max()) * 2 * math.sqrt(len(one)) < 4.5
    for of in (lambda x: x >> 40, lambda x: x & 0xFFFFFF):
        assert abs(correlation(of(one), of(other))) < 4


def test_a_million_neighbouring_keys_and_places_have_no_word_in_common():
    keys = keys_of(range(1000)).repeat(1000)
    places = torch.arange(1000).repeat_interleave(1000)
    assert len(child(keys, "a", places).unique()) == 10**6


def test_permutations_are_even():
    drawn = permutations(keys_of(range(12_000)), 4, "order")
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(4).expand(12_000, 4))
    counts = torch.bincount((drawn * 4 ** torch.arange(4)).sum(1))
    counts = counts[counts > 0].double()
    assert len(counts) == 24
    assert float(((counts - 500) ** 2 / 500).sum()) < 49.7  # chi squared of 23, exceeded once in a thousand times


@pytest.mark.parametrize("draw", [uniforms, normals])
def test_nothing_is_drawn_from_nothing(draw):
    assert draw(keys_of([]), (3,), "a").shape == (0, 3)
    assert draw(KEYS, (0, 2), "a").shape == (64, 0, 2)
    assert draw(KEYS[:2], (), "a").shape == (2,)


def test_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    normals(KEYS, (5,), "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_key_is_refused():
    with pytest.raises(ValueError, match="int64 of shape"):
        normals(torch.zeros(3), (2,), "a")
    with pytest.raises(ValueError, match="int64 of shape"):
        normals(torch.zeros(3, 2, dtype=torch.int64), (2,), "a")
    with pytest.raises(ValueError, match="round up to 1"):
        uniforms(KEYS, (2,), "a", dtype=torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    for draw in (bits, permutations):
        assert torch.equal(draw(KEYS, 10_001, "a"), draw(KEYS.cuda(), 10_001, "a").cpu())
    assert torch.equal(uniforms(KEYS, (10_001,), "a"), uniforms(KEYS.cuda(), (10_001,), "a").cpu())
    assert (normals(KEYS, (10_001,), "a") - normals(KEYS.cuda(), (10_001,), "a").cpu()).abs().max() < 1e-6
