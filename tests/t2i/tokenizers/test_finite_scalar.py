import numpy as np
import pytest
import torch

from t2i.tokenizers.finite_scalar import FiniteScalarConfig

LEVELS = (8, 5, 4, 3)
CHANCE = torch.Generator().manual_seed(0)


def shifted(levels=LEVELS):
    return FiniteScalarConfig(levels=levels, shifted=True).build()


def test_values_are_those_of_the_published_code_in_numpy():
    """arXiv 2309.15505, appendix A.1, for one vector at a time."""
    z = 2 * torch.randn(2, len(LEVELS), 4, 4, generator=CHANCE)
    found = shifted()(z)
    levels = np.array(LEVELS)
    reach, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2 == 1, 0.0, 0.5)
    rows = z.movedim(1, -1).reshape(-1, len(LEVELS)).double().numpy()
    whole = np.round(np.tanh(rows + np.arctanh(offset / reach)) * reach - offset)
    expected = whole / (levels // 2)
    np.testing.assert_allclose(found.vectors.movedim(1, -1).reshape(-1, len(LEVELS)), expected, atol=1e-6)
    basis = np.cumprod([1, *levels[:-1]])
    assert found.codes.flatten().tolist() == ((whole + levels // 2) * basis).sum(1).astype(int).tolist()


@pytest.mark.parametrize("levels", [LEVELS, (8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5)], ids=str)
def test_codes_vectors_and_gradients_are_those_of_vector_quantize_pytorch(levels):
    theirs = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels), channel_first=True)
    ours, z = shifted(levels), 2 * torch.randn(3, len(levels), 6, 6, generator=CHANCE)
    mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    found, (heard, codes) = ours(mine), theirs(other)
    torch.testing.assert_close(found.vectors, heard)
    assert torch.equal(found.codes, codes.long())
    torch.testing.assert_close(ours.lookup(found.codes), theirs.indices_to_codes(codes))
    pull = torch.randn(z.shape, generator=CHANCE)
    (found.vectors * pull).sum().backward()
    (heard * pull).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)


def test_nothing_is_nothing():
    """The shift is there for that: 0 comes out as 0 with even levels, too."""
    assert shifted()(torch.zeros(1, len(LEVELS), 1, 1)).vectors.abs().max() == 0
    unshifted = FiniteScalarConfig(levels=LEVELS).build()
    assert unshifted(torch.zeros(1, len(LEVELS), 1, 1)).vectors.abs().max() > 0


def test_all_codes_are_reached():
    quantizer, codes = shifted(), torch.arange(8 * 5 * 4 * 3).view(1, 1, -1)
    vectors = quantizer.lookup(codes)
    assert vectors.amin((0, 2, 3)).tolist() == [-1, -1, -1, -1]
    assert vectors.amax((0, 2, 3)).tolist() == [0.75, 1, 0.5, 1]
    reach = (quantizer._levels - 1) * 1.001 / 2
    offset = (1 - quantizer._levels % 2) / 2
    inner = torch.atanh((vectors.movedim(1, -1) * (quantizer._levels // 2) + offset) / reach) - torch.atanh(
        offset / reach
    )
    assert torch.equal(quantizer(inner.movedim(-1, 1)).codes, codes)


def test_an_axis_of_two_values_cannot_be_shifted():
    with pytest.raises(ValueError, match="at least 3 levels"):
        shifted((8, 2))
