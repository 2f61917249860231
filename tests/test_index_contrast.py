"""Contrast stretching: what it undoes, what it leaves, and that images of a batch do not see each other."""

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tmm_engine.index.contrast import stretch_contrast

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
PIXELS = SHAPES.flatmap(lambda shape: hnp.arrays(np.uint8, shape)).map(lambda image: torch.from_numpy(image / 255.0))
BATCHES = st.tuples(st.integers(1, 5), st.just(2), st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32))
)


@given(image=PIXELS, darker=st.floats(0.01, 1.0), lift=st.floats(0.0, 1.0))
def test_darkening_and_lost_contrast_are_undone(image, darker, lift):
    assume(image.min() < image.max())
    faded = darker * image + lift * (1.0 - darker)  # within [0, 1], so nothing is cut off
    torch.testing.assert_close(stretch_contrast(faded), stretch_contrast(image), rtol=0.0, atol=1e-10)


@given(images=BATCHES.map(torch.from_numpy))
def test_it_is_linear_onto_the_whole_range_for_all_channels_together(images):
    for image, stretched in zip(images, stretch_contrast(images), strict=True):
        assert stretched.dtype == image.dtype
        if image.min() == image.max():
            assert torch.equal(stretched, image)
            continue
        assert (float(stretched.min()), float(stretched.max())) == (0.0, 1.0)
        expected = np.interp(image.double(), [float(image.min()), float(image.max())], [0.0, 1.0])
        np.testing.assert_allclose(stretched, expected, rtol=0.0, atol=1e-6)


@given(images=BATCHES.map(torch.from_numpy))
def test_twice_is_once_bit_for_bit(images):
    once = stretch_contrast(images)
    assert torch.equal(stretch_contrast(once), once)


@given(images=BATCHES.map(torch.from_numpy))
def test_a_batch_is_its_images_one_by_one_and_stays_as_it_was(images):
    before = images.clone()
    together = stretch_contrast(images)
    assert torch.equal(together, torch.stack([stretch_contrast(image) for image in images]))
    assert torch.equal(together[None], stretch_contrast(images[None]))
    assert torch.equal(images, before)


@given(level=st.floats(0, 1, width=32), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_constant_image_stays(level, dtype):
    image = torch.full((3, 4, 4), level, dtype=dtype)
    assert torch.equal(stretch_contrast(image), image)
    mixed = torch.stack([image, torch.arange(48, dtype=dtype).reshape(3, 4, 4) / 48])
    assert torch.equal(stretch_contrast(mixed)[0], image)
