"""Pictures of any size come to CLIP's square as transformers brings them there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.clip.fit import MEAN, STD, fitted, processor


@given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from([15, 16, 33]), st.sampled_from(["crop", "stretch"]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_picture_is_fitted_as_in_transformers(height, width, side, fit, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = fitted(pixels, side, fit)
    assert (ours.shape, ours.dtype) == ((side, side, 3), np.uint8)
    theirs = processor(side, fit)(images=[pixels], input_data_format="channels_last", return_tensors="np")
    scaled = ((ours / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(scaled, theirs["pixel_values"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("fit", "seen"), [("crop", 1), ("stretch", 3)])
def test_a_wide_picture_is_cropped_or_stretched(fit, seen):
    pixels = np.repeat(np.array([[[0] * 3, [128] * 3, [255] * 3]], np.uint8), 16, axis=1).repeat(16, axis=0)
    assert len(np.unique(fitted(pixels, 16, fit)[:, [0, 8, 15]])) == seen
