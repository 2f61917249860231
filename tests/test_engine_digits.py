"""The digits that the package ships are scikit-learn's, bit for bit."""

import numpy as np
from sklearn import datasets

from tmm_engine.digits import load_digits


def test_they_are_scikit_learns():
    images, labels = load_digits()
    original = datasets.load_digits()
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.array_equal(images, np.rint(original.images * (255 / 16)))
    assert np.array_equal(labels, original.target)
