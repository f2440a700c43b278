import numpy as np
import pytest
import torch
from torch.nn import functional

from t2i.nn.weights import initialize
from t2i.random import keys_of
from t2i.tokenizers.autoencoder import Noise
from t2i.tokenizers.codebook import AveragedCodebook, CodebookConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.turns import GeneratorTurn

CHANCE = torch.Generator().manual_seed(0)
SPHERE = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "sphere"])


def codebook(**options):
    made = CodebookConfig(**{"size": 16, "width": 4, "ema": 0.99} | options).build()
    initialize(made, 0)
    return made


def noise(rows, step=0, weight=None, first=0):
    return Noise(keys_of(range(first, first + rows)), step, weight)


def vectors(rows=6):
    return torch.randn(rows, 4, 3, 5, generator=CHANCE)


def codes_of(made):
    return made.lookup(torch.arange(made.size).view(1, 1, -1))[0, :, 0].T


def plain_loop(book, batches, decay, normalize):
    """The averages of arXiv 1711.00937, appendix A.1, in NumPy: the codebook after each batch of vectors."""
    counts, sums, size = np.ones(len(book)), book.astype(float), len(book)
    for z in batches:
        z = np.moveaxis(z, 1, -1).reshape(-1, book.shape[1]).astype(float)
        if normalize:
            z = z / np.linalg.norm(z, axis=1, keepdims=True)
            book = book / np.linalg.norm(book, axis=1, keepdims=True)
        nearest = ((z[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        for k in range(size):
            counts[k] = decay * counts[k] + (1 - decay) * (nearest == k).sum()
            sums[k] = decay * sums[k] + (1 - decay) * z[nearest == k].sum(0)
        smoothed = (counts + 1e-5) / (counts.sum() + size * 1e-5) * counts.sum()
        book = sums / smoothed[:, None]
        yield book / np.linalg.norm(book, axis=1, keepdims=True) if normalize else book


@SPHERE
def test_codes_are_the_averages_of_what_they_stood_for(normalize):
    made = codebook(normalize=normalize, ema=0.9)
    batches = [vectors() for _ in range(8)]
    loop = plain_loop(made.sums.numpy().copy(), [z.numpy() for z in batches], 0.9, normalize)
    for z, expected in zip(batches, loop, strict=True):
        made.stepped(made(z, noise(len(z))).seen)
        np.testing.assert_allclose(codes_of(made), expected, rtol=1e-5, atol=1e-6)


@SPHERE
def test_steps_are_those_of_vector_quantize_pytorch(normalize):
    theirs = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(
        dim=4, codebook_size=16, decay=0.99, eps=1e-5, use_cosine_sim=normalize, accept_image_fmap=True
    )
    made = codebook(normalize=normalize)
    begins = functional.normalize(made.sums, dim=1) if normalize else made.sums
    made.sums.copy_(begins)
    with torch.no_grad():
        theirs._codebook.embed.copy_(begins[None])
        theirs._codebook.embed_avg.copy_(begins[None])
    for _ in range(20):
        z = vectors()
        found, (heard, codes, loss) = made(z, noise(len(z))), theirs(z)
        assert torch.equal(found.codes, codes)
        torch.testing.assert_close(found.vectors, heard)
        torch.testing.assert_close(found.losses["commitment"].mean(), loss.squeeze())
        made.stepped(found.seen)
        torch.testing.assert_close(codes_of(made), theirs._codebook.embed[0])


def test_the_first_step_moves_codes_a_little():
    """With counts that begin at zero the codes in use would be thrown out fiftyfold."""
    made = codebook()
    before, z = codes_of(made).clone(), vectors()
    torch.testing.assert_close(before, made.sums)
    made.stepped(made(z, noise(len(z))).seen)
    moved = (codes_of(made) - before).norm(dim=1)
    assert 0 < moved.max() <= (z.movedim(1, -1).reshape(-1, 4).norm(dim=1).max() + before.norm(dim=1).max())
    unused = torch.ones(16, dtype=torch.bool).index_fill_(0, made(z).codes.unique(), False)
    assert moved[unused].max() < 0.05


def test_a_code_of_no_vector_stays_where_it_is():
    made = codebook(size=3)
    made.sums.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [50, 50, 50, 50]]))
    for _ in range(50):
        z = vectors().clamp(-1, 1)
        made.stepped(made(z, noise(len(z))).seen)
    torch.testing.assert_close(codes_of(made)[2], torch.full((4,), 50.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dead_below", [0.0, 2.0])
def test_the_sums_are_those_of_counted_rows_however_shared_out(dead_below):
    made, z = codebook(dead_below=dead_below), vectors(6)
    weight = torch.tensor([1.0, 1, 0, 1, 0, 1])
    whole = made(z, Noise(keys_of(range(6)), 3, weight)).seen
    parts = [made(z[i:j], Noise(keys_of(range(i, j)), 3, weight[i:j])).seen for i, j in ((0, 1), (1, 4), (4, 6))]
    alone = made(z[weight > 0], Noise(keys_of([0, 1, 3, 5]), 3)).seen
    turned = made(z.flip(0), Noise(keys_of(range(6)).flip(0), 3, weight.flip(0))).seen
    assert len(whole) == (4 if dead_below else 2)
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
        torch.testing.assert_close(alone[name], value)
        torch.testing.assert_close(turned[name], value)
    assert whole["counts"].sum() == 4 * 15


def test_without_noise_nothing_is_seen():
    assert codebook()(vectors()).seen == {}


def test_dead_codes_take_vectors_of_the_batch():
    made = codebook(size=64, dead_below=1.5, ema=0.5)
    z = vectors()
    flat = z.movedim(1, -1).reshape(-1, 4)
    found = made(z, noise(len(z), 7)).seen
    dead = (made.counts + found["counts"]) / 2 < 1.5
    taken = dead & (found["candidates"] == 1)
    assert 5 < taken.sum() < dead.sum()
    made.stepped(found)
    book = codes_of(made)
    nearest = (book[:, None] - flat[None]).norm(dim=-1)
    assert (nearest[taken].amin(1) < 1e-5).all()
    assert (nearest[~taken].amin(1) > 1e-4).all()
    assert len(nearest[taken].argmin(1).unique()) == taken.sum()  # each another
    assert torch.equal(made.counts[taken], torch.full((int(taken.sum()),), 1.5))
    # Another step, another choice.
    assert not torch.equal(made(z, noise(len(z), 8)).seen["candidates"], made(z, noise(len(z), 7)).seen["candidates"])


def test_codes_that_died_are_soon_in_use_again():
    """All begin far from what they are to stand for, which leaves one to speak for all."""
    used = []
    for dead_below in (0.0, 0.5):
        made = codebook(size=32, ema=0.8, dead_below=dead_below)
        made.sums.add_(50)
        for step in range(40):
            z = vectors()
            made.stepped(made(z, noise(len(z), step)).seen)
        used.append(len(made(vectors(20)).codes.unique()))
    assert used[0] < 4
    assert used[1] > 24


def test_the_codes_are_buffers_and_begin_by_their_names():
    made, again = codebook(), codebook()
    assert not list(made.parameters())
    assert {*made.state_dict()} == {"counts", "sums"}
    assert torch.equal(made.sums, again.sums)
    gradient = CodebookConfig(size=16, width=4).build()
    initialize(gradient, 0)
    assert gradient.vectors.abs().max() <= 1 / 16
    assert 0.5 / 16 < made.sums.abs().max() <= 1 / 16


def test_beta_is_of_the_encoders_side():
    """What taming-transformers and diffusers have on the wrong term: the loss is the same, gradients are not."""
    made = CodebookConfig(size=16, width=4).build()
    initialize(made, 0)
    z = vectors(2).requires_grad_()
    found, weights = made(z), LossConfig().weights()
    total = sum(weights[name] * loss.sum() for name, loss in found.losses.items())
    assert float(total.detach()) == pytest.approx(1.25 * float(found.losses["codebook"].sum().detach()))
    inner, outer = torch.autograd.grad(total, [z, made.vectors])
    difference = z.detach() - made.lookup(found.codes).detach()
    torch.testing.assert_close(inner, 0.25 * 2 * difference / difference[0].numel())
    expected = torch.zeros(16, 4).index_add_(
        0, found.codes.flatten(), -2 * difference.movedim(1, -1).reshape(-1, 4) / difference[0].numel()
    )
    torch.testing.assert_close(outer, expected)


def test_on_the_sphere_vectors_and_codes_are_of_length_one():
    """ViT-VQGAN (arXiv 2110.04627) normalizes both, so the nearest is that of the greatest cosine."""
    for config in (
        CodebookConfig(size=16, width=4, normalize=True),
        CodebookConfig(size=16, width=4, ema=0.9, normalize=True),
    ):
        made = config.build()
        initialize(made, 0)
        z = 7 * vectors(2)
        found, book = made(z), codes_of(made).detach()
        torch.testing.assert_close(book.norm(dim=1), torch.ones(16))
        torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(2, 3, 5))
        cosines = torch.einsum("bdhw,kd->bkhw", functional.normalize(z, dim=1), book)
        assert torch.equal(found.codes, cosines.argmax(1))
        torch.testing.assert_close(found.losses["commitment"], (2 - 2 * cosines.amax(1)).mean((1, 2)) / 4)


def test_a_linear_codebook_is_simvq():
    theirs = pytest.importorskip("vector_quantize_pytorch").SimVQ(
        dim=4, codebook_size=16, channel_first=True, rotation_trick=False
    )
    made = CodebookConfig(size=16, width=4, linear=True).build()
    initialize(made, 0)
    assert not made.vectors.requires_grad
    with torch.no_grad():
        made.mix.weight.copy_(torch.randn(4, 4, generator=CHANCE))
        theirs.frozen_codebook.copy_(made.vectors)
        theirs.code_transform.weight.copy_(made.mix.weight)
    z = vectors().requires_grad_()
    found, (heard, codes, loss) = made(z), theirs(z)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.vectors, heard)
    ours = found.losses["codebook"].mean() + 0.25 * found.losses["commitment"].mean()
    torch.testing.assert_close(ours, loss)
    pairs = [
        torch.autograd.grad(each, [z, of.weight]) for each, of in ((ours, made.mix), (loss, theirs.code_transform))
    ]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_turn_hands_over_what_was_seen_in_training_alone():
    config = PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=CodebookConfig(size=16, width=4, ema=0.9))
    turn = GeneratorTurn(config.build(), LossConfig())
    initialize(turn, 0)
    assert isinstance(turn.tokenizer.quantizer, AveragedCodebook)
    batch = {
        "images": torch.randint(256, (3, 3, 8, 8), generator=CHANCE, dtype=torch.uint8),
        "weight": torch.tensor([1.0, 0.0, 1.0]),
        "step": torch.tensor(3),
        "noise_key": keys_of(range(3)),
    }
    given = turn(batch)
    assert given.keys() == turn.targets(batch).keys() | {"counts", "sums"}
    assert given["counts"].sum() == 2 * 16
    before = turn.tokenizer.quantizer.sums.clone()
    turn.stepped({name: given[name] for name in ("counts", "sums")})
    assert not torch.equal(turn.tokenizer.quantizer.sums, before)
    assert turn.eval()(batch).keys() == turn.targets(batch).keys() == {"reconstruction", "commitment"}


def test_what_cannot_be_is_refused():
    for options, said in (
        ({"ema": 1.0}, "below 1"),
        ({"ema": 0.9, "linear": True}, "not linear"),
        ({"dead_below": 1.0}, "of them alone"),
    ):
        with pytest.raises(ValueError, match=said):
            CodebookConfig(size=16, width=4, **options)
