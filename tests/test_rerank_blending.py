"""How an image and a trigger are combined: every reading of it, and the intensity of a query."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tmm_engine.rerank.blending import apply_trigger, intensity_of
from tmm_engine.rerank.settings import Blend

IMAGES = hnp.arrays(np.uint8, (3, 8, 8))


@given(image=IMAGES)
def test_the_intensity_is_numpys_standard_deviation(image):
    pixels = image / 255.0
    assert intensity_of(torch.tensor(pixels)) == pytest.approx(pixels.std(), rel=1e-12, abs=1e-15)
    single = torch.tensor(pixels).float()
    assert intensity_of(single) == pytest.approx(pixels.std(), rel=1e-6, abs=1e-7)


@settings(max_examples=50)
@given(
    images=hnp.arrays(np.float64, (2, 3, 4, 4), elements=st.floats(0.0, 1.0)),
    trigger=hnp.arrays(np.float64, (3, 4, 4), elements=st.floats(-3.0, 3.0)),
    omega=st.floats(0.0, 1.0),
)
def test_every_blend_is_its_formula(images, trigger, omega):
    formulas = {
        Blend.PRINTED: images * omega + trigger * (1 - omega),
        Blend.SWAPPED: images * (1 - omega) + trigger * omega,
        Blend.SCALED: images + omega * trigger,
        Blend.ADDED: images + trigger,
    }
    assert set(formulas) == set(Blend)
    x, tau = torch.tensor(images), torch.tensor(trigger)
    for blend, expected in formulas.items():
        free = apply_trigger(x, tau, intensity=omega, blend=blend, clamp=False)
        clamped = apply_trigger(x, tau, intensity=omega, blend=blend, clamp=True)
        np.testing.assert_allclose(free, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(clamped, expected.clip(0, 1), rtol=0, atol=1e-12)
        single = apply_trigger(x[1], tau, intensity=omega, blend=blend, clamp=True)
        assert torch.equal(single, clamped[1])
    np.testing.assert_array_equal(x, images)
    np.testing.assert_array_equal(tau, trigger)
