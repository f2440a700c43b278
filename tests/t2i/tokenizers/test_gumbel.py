import math

import pytest
import torch
from torch.nn import functional

from t2i.nn.weights import initialize
from t2i.random import keys_of
from t2i.tokenizers.autoencoder import Noise
from t2i.tokenizers.gumbel import GumbelConfig, gumbels
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.turns import GeneratorTurn

WIDE = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(3, 8, 2, 4, generator=WIDE)


def quantizer(**options):
    made = GumbelConfig(**{"size": 8, "width": 4, "anneal_steps": 100, "warmup_steps": 10} | options).build()
    initialize(made, 0)
    return made


def noise(step=50, seeds=(1, 2, 3)):
    return Noise(keys_of(seeds), step, torch.ones(len(seeds)))


def test_the_schedules_are_those_of_dall_e():
    published = GumbelConfig()
    steps = [0, 37_500, 75_000, 112_500, 150_000, 400_000]
    found = [published.temperature_at(step) for step in steps]
    assert found == pytest.approx([1, 0.8627063, 0.53125, 0.1997937, 0.0625, 0.0625], rel=1e-6)
    found = [6.6 * published.share_at(step) for step in (0, 2_500, 5_000, 9_000)]
    assert found == pytest.approx([0, 3.3, 6.6, 6.6])


def test_nothing_is_annealed_in_no_steps():
    config = GumbelConfig(anneal_steps=0, warmup_steps=0)
    assert (config.temperature_at(0), config.share_at(0)) == (1 / 16, 1)


def test_the_kl_of_one_likely_code_of_four():
    logits = torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1)
    config = {"size": 4, "warmup_steps": 0}
    for shape in ((1, 1, 1, 1), (3, 1, 2, 5)):  # of a mean over positions, a row
        rows = logits.repeat(*shape)
        losses = quantizer(**config)(rows, noise(seeds=range(len(rows)))).losses
        torch.testing.assert_close(losses["kl"], torch.full((len(rows),), 0.117992952))
        # Without noise, as in evaluation, and whatever the temperature.
        torch.testing.assert_close(quantizer(**config)(rows).losses["kl"], losses["kl"])


def test_the_kl_grows_with_the_steps_and_is_whole_in_evaluation():
    made = quantizer()
    whole = made(LOGITS).losses["kl"]
    for step, share in ((0, 0), (5, 0.5), (10, 1), (99, 1)):
        torch.testing.assert_close(made(LOGITS, noise(step)).losses["kl"], share * whole)


def test_the_weight_in_a_sum_over_all_values_of_a_picture():
    """DALL-E divides the sum of all by 3 H W: beta / 192 of the mean over codes of 8x8 pixels."""
    kl = functional.kl_div(torch.tensor(1 / 8).log(), LOGITS.log_softmax(1), log_target=True, reduction="none")
    sums = kl.sum((1, 2, 3))
    values = 3 * 8 * LOGITS.shape[2] * 8 * LOGITS.shape[3]
    torch.testing.assert_close(6.6 / 192 * quantizer()(LOGITS).losses["kl"], 6.6 * sums / values)


@pytest.mark.parametrize("step", [0, 50, 400])
def test_the_draw_is_a_softmax_of_noisy_logits(step):
    made = quantizer()
    logits = LOGITS.clone().requires_grad_()
    found = made(logits, noise(step))
    drawn = logits + gumbels(noise(step), (8, 2, 4))
    heard = (drawn / made.config.temperature_at(step)).softmax(1)
    expected = functional.conv2d(heard, made.vectors.T[:, :, None, None])
    torch.testing.assert_close(found.vectors, expected)
    assert torch.equal(found.codes, drawn.argmax(1))
    pull = torch.randn(expected.shape, generator=WIDE)
    for gradient, wanted in zip(
        torch.autograd.grad((found.vectors * pull).sum(), [logits, made.vectors]),
        torch.autograd.grad((expected * pull).sum(), [logits, made.vectors]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


def test_straight_through_the_decoder_hears_one_code_and_gradients_are_of_the_blend():
    made, relaxed = quantizer(straight_through=True), quantizer()
    logits = LOGITS.clone().requires_grad_()
    found = made(logits, noise())
    torch.testing.assert_close(found.vectors, made.lookup(found.codes), rtol=0, atol=0)
    pull = torch.randn(found.vectors.shape, generator=WIDE)
    (gradient,) = torch.autograd.grad((found.vectors * pull).sum(), logits)
    (wanted,) = torch.autograd.grad((relaxed(logits, noise()).vectors * pull).sum(), logits)
    torch.testing.assert_close(gradient, wanted)


def test_codes_are_drawn_as_likely_as_the_logits_say():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    codes = quantizer(size=4)(logits.view(1, 4, 1, 1).repeat(1, 1, 200, 200), noise(seeds=(7,))).codes
    counts = codes.flatten().bincount(minlength=4)
    expected = 40_000 * logits.softmax(0)
    assert ((counts - expected).square() / expected).sum() < 16.27  # chi-square, 3 degrees, one in a thousand


def test_the_noise_has_the_moments_of_a_gumbel():
    drawn = gumbels(noise(), (1000, 100)).double()
    assert drawn.isfinite().all()
    assert float(drawn.mean()) == pytest.approx(0.5772157, abs=0.01)
    assert float(drawn.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_a_rows_draw_is_its_own_and_its_keys():
    made = quantizer()
    whole = made(LOGITS, noise())
    alone = made(LOGITS[1:2], noise(seeds=(2,)))
    torch.testing.assert_close(alone.vectors, whole.vectors[1:2])  # a product of other shapes rounds otherwise
    assert torch.equal(alone.codes, whole.codes[1:2])
    assert not torch.equal(made(LOGITS[1:2], noise(seeds=(3,))).codes, alone.codes)


def test_without_noise_the_likeliest_code_stands():
    made = quantizer()
    found = made(LOGITS)
    assert torch.equal(found.codes, LOGITS.argmax(1))
    assert torch.equal(found.vectors, made.lookup(found.codes))


def test_16_bits_around_it_change_nothing():
    made = quantizer()
    plain = made(LOGITS, noise())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = made(LOGITS, noise())
    assert torch.equal(rounded.vectors, plain.vectors)


def test_in_training_the_turn_draws_and_in_evaluation_not():
    config = PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=GumbelConfig(size=8, width=4, warmup_steps=0))
    turn = GeneratorTurn(config.build(), LossConfig(kl=6.6 / 12))
    initialize(turn, 0)
    batch = {
        "images": torch.randint(256, (3, 3, 8, 8), generator=WIDE, dtype=torch.uint8),
        "weight": torch.ones(3),
        "step": torch.tensor(3),
    }
    drawn = [turn(batch | {"noise_key": keys_of(seeds)}) for seeds in ((1, 2, 3), (4, 5, 6))]
    assert drawn[0].keys() == turn.targets(batch).keys() == {"reconstruction", "kl"}
    assert drawn[0]["reconstruction"] != drawn[1]["reconstruction"]
    drawn[0]["reconstruction"].backward()
    assert all(parameter.grad is not None for parameter in turn.parameters())
    turn.eval()
    still = [turn(batch | {"noise_key": keys_of(seeds)}) for seeds in ((1, 2, 3), (4, 5, 6))]
    assert still[0] == still[1]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 2 codes"):
        GumbelConfig(size=1)
    with pytest.raises(ValueError, match="temperatures above 0"):
        GumbelConfig(last_temperature=0)
