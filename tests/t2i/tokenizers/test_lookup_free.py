import pytest
import torch

from t2i.nn.weights import initialize
from t2i.random import keys_of
from t2i.tokenizers.autoencoder import Noise
from t2i.tokenizers.lookup_free import LookupFreeConfig

CHANCE = torch.Generator().manual_seed(0)


def quantizer(**options):
    made = LookupFreeConfig(**{"width": 6, "group": 6, "temperature": 0.5} | options).build()
    initialize(made, 0)
    return made


def hidden(rows=4):
    return torch.randn(rows, 6, 3, 5, generator=CHANCE)


def shares(z, temperature):
    """q over all 64 codes, (B, P, 64), by distances."""
    book = 2.0 * (torch.arange(64)[:, None] >> torch.arange(6) & 1) - 1
    distances = (z.movedim(1, -1).flatten(1, 2)[:, :, None] - book).square().sum(-1)
    return (-distances / temperature).softmax(-1)


def test_codes_are_the_bits_of_the_signs():
    z = hidden()
    found = quantizer()(z)
    assert torch.equal(found.vectors, torch.where(z > 0, 1.0, -1.0))
    assert torch.equal(found.codes, sum((z[:, i] > 0) * 2**i for i in range(6)))
    assert torch.equal(quantizer().lookup(found.codes), found.vectors)
    codes = torch.arange(64).view(1, 8, 8)
    assert torch.equal(quantizer()(quantizer().lookup(codes)).codes, codes)


def test_the_entropy_is_the_published_one_where_the_average_is_the_batchs():
    made = quantizer()
    z = hidden().requires_grad_()
    q = shares(z, 0.5)
    mean = q.mean((0, 1))
    expected = -(q * q.log()).sum(-1).mean() + (mean * mean.log()).sum()
    made.usage.copy_(mean.detach()[None])
    loss = made(z).losses["entropy"].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))


def test_the_losses_are_those_of_vector_quantize_pytorch():
    """Their distance is -2 z c, all of |z - c|^2 that depends on c; their temperature is one over ours."""
    theirs = pytest.importorskip("vector_quantize_pytorch").LFQ(
        dim=6, codebook_size=64, entropy_loss_weight=0.1, commitment_loss_weight=0.25, channel_first=True
    )
    made, z = quantizer(temperature=0.5), hidden()
    made.usage.copy_(shares(z, 0.5).mean((0, 1))[None])
    mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    found = made(mine)
    _, their_codes, aux = theirs(other, inv_temperature=1 / 0.5)
    ours = 0.1 * found.losses["entropy"].mean() + 0.25 * found.losses["commitment"].mean()
    torch.testing.assert_close(ours, aux, rtol=1e-3, atol=1e-4)  # they clamp below 1e-5 before the logarithm
    flipped = sum((found.codes >> i & 1) << (5 - i) for i in range(6))  # they count bits from the other end
    assert torch.equal(flipped, their_codes)
    torch.testing.assert_close(torch.autograd.grad(ours, mine), torch.autograd.grad(aux, other), rtol=1e-2, atol=1e-4)


def test_groups_of_bits_bound_the_entropy():
    z = hidden()
    whole = [shares(z, 0.5).mean((0, 1))]
    parts = [whole[0].view(8, 8).sum(0), whole[0].view(8, 8).sum(1)]  # of the lower three bits, of the upper three
    made = quantizer(group=3)
    made.usage.copy_(torch.stack(parts))
    found = made(z).losses["entropy"].mean()
    q = shares(z, 0.5)
    entropy = {name: -sum((p * p.log()).sum() for p in each) for name, each in (("whole", whole), ("parts", parts))}
    torch.testing.assert_close(found, -(q * q.log()).sum(-1).mean() - entropy["parts"])
    assert entropy["parts"] >= entropy["whole"]


def test_the_average_follows_the_global_batch_however_it_is_shared_out():
    made, z = quantizer(decay=0.9), hidden()
    weight, keys = torch.tensor([1.0, 1, 0, 1]), keys_of(range(4))
    whole = made(z, Noise(keys, 0, weight)).seen["usage"]
    parts = [made(z[i:j], Noise(keys[i:j], 0, weight[i:j])).seen["usage"] for i, j in ((0, 3), (3, 4))]
    torch.testing.assert_close(sum(parts), whole)
    expected = 0.9 / 64 + 0.1 * shares(z[weight > 0], 0.5).mean((0, 1))
    made.stepped({"usage": whole})
    torch.testing.assert_close(made.usage[0], expected)
    made.stepped({"usage": torch.zeros_like(whole)})
    torch.testing.assert_close(made.usage[0], expected)


def test_it_has_no_weights_and_no_row_sees_another():
    made, z = quantizer(), hidden()
    assert not list(made.parameters())
    alone = made(z[2:3]).losses
    for name, loss in made(z).losses.items():
        torch.testing.assert_close(loss[2:3], alone[name])
    assert made(z).seen == {}


def test_the_published_size_is_within_reach():
    made = LookupFreeConfig().build()
    initialize(made, 0)
    z = torch.randn(2, 18, 4, 4, generator=CHANCE).requires_grad_()
    found = made(z)
    assert made.size == 262_144
    assert found.codes.max() > 2**16
    found.losses["entropy"].sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"width": 0}, {"temperature": 0.0}, {"group": 4}, {"decay": 1.0}], ids=str)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="bits"):
        LookupFreeConfig(**{"width": 6, "group": 6} | options)
