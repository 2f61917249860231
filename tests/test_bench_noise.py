"""Perturbations of queries: range, size, direction, reproducibility."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.noise import FAMILIES, Family, Perturbation, gaussian_reach, parse, standard_perturbations
from tmm_engine.index.errors import InputError

SEEDS = st.integers(0, 2**63 - 1)
EVERY = [perturbation for family in Family for perturbation in standard_perturbations([family])]


def picture(seed: int, shape: tuple[int, ...] = (3, 8, 8)) -> np.ndarray:
    """Read-only; about half of its pixels at 0 or 1, as in a drawing."""
    image = np.clip(np.random.default_rng(seed).uniform(-0.5, 1.5, shape), 0, 1).astype(np.float32)
    image.flags.writeable = False
    return image


def smooth(shape: tuple[int, int, int] = (3, 8, 8)) -> np.ndarray:
    """A slope from 0.3 to 0.7, of another direction in each channel."""
    channels, height, width = shape
    ramps = [np.add.outer(c * np.arange(height), np.arange(width)) for c in range(channels)]
    return np.stack([0.3 + 0.4 * ramp / ramp.max() for ramp in ramps]).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))


def perturb(text: str, image: np.ndarray, *, seed: int = 0, classifier=None) -> np.ndarray:
    return parse(text).apply(image, seed=seed, embedding=classifier and features_of(classifier))


@pytest.mark.parametrize("perturbation", EVERY, ids=lambda perturbation: perturbation.name)
def test_pixels_stay_pixels_and_the_query_stays_as_it_is(perturbation, classifier):
    for image in (picture(1), np.zeros((3, 8, 8), np.float32), np.ones((3, 8, 8), np.float32)):
        before = image.copy()
        result = perturb(perturbation.name, image, seed=3, classifier=classifier)
        assert result.dtype == np.float32
        assert result.shape == image.shape
        assert 0 <= result.min() <= result.max() <= 1
        assert np.array_equal(image, before)
        assert not np.shares_memory(result, image)
        assert result.tobytes() == perturb(perturbation.name, image, seed=3, classifier=classifier).tobytes()


@given(st.integers(0, 2**32 - 1), SEEDS, st.floats(0, 1), st.sampled_from([(1, 5, 5), (3, 8, 8), (3, 32, 32)]))
def test_gaussian_noise_has_its_norm_after_clipping(content, seed, share, shape):
    image = picture(content, shape)
    level = share * gaussian_reach(image, seed=seed)
    result = Perturbation(Family.GAUSSIAN, level).apply(image, seed=seed)
    assert distance(result, image) == pytest.approx(level, abs=1e-4)
    assert 0 <= result.min() <= result.max() <= 1


def test_gaussian_noise_has_its_norm_on_large_images():
    image = picture(0, (3, 224, 224))
    assert distance(perturb("gaussian 100", image), image) == pytest.approx(100, abs=1e-4)


def test_gaussian_noise_goes_as_far_as_every_pixel_can_and_no_farther():
    image = picture(0)
    farthest = gaussian_reach(image, seed=5)
    end = Perturbation(Family.GAUSSIAN, farthest).apply(image, seed=5)
    assert set(np.unique(end)) == {0.0, 1.0}
    with pytest.raises(InputError, match=r"room in \[0, 1\] for a perturbation of L2 norm .* smaller level"):
        Perturbation(Family.GAUSSIAN, farthest * 1.001).apply(image, seed=5)


def test_gaussian_levels_lie_on_one_path_that_the_seed_and_the_shape_decide():
    gray, other = np.full((3, 8, 8), 0.5, np.float32), smooth()
    steps = [perturb(f"gaussian {level}", gray, seed=7).astype(np.float64) - 0.5 for level in (0.5, 1.0)]
    np.testing.assert_allclose(2 * steps[0], steps[1], atol=1e-6)  # nothing is clipped yet
    np.testing.assert_allclose(perturb("gaussian 1", other, seed=7) - other, steps[1], atol=1e-6)
    assert distance(perturb("gaussian 1", gray, seed=8), perturb("gaussian 1", gray, seed=7)) > 1
    far, farther = (perturb(f"gaussian {level}", gray, seed=7) for level in (4.0, 5.0))
    clipped = (far == 0) | (far == 1)
    assert clipped.any()
    assert np.array_equal(far[clipped], farther[clipped])


def test_the_noise_looks_gaussian():
    noise = perturb("gaussian 1", np.full((3, 32, 32), 0.5, np.float32)).astype(np.float64).ravel() - 0.5
    scaled = noise * np.sqrt(noise.size)
    assert abs(scaled.mean()) < 0.1
    assert np.mean(np.abs(scaled) < 1) == pytest.approx(0.683, abs=0.03)
    assert np.mean(np.abs(scaled) < 2) == pytest.approx(0.954, abs=0.02)


def test_brightness_and_contrast_have_their_factor():
    image = smooth()
    assert np.array_equal(perturb("brightness 0.3", image), image * np.float32(0.3))
    assert np.array_equal(perturb("brightness 1", image), image)
    flat = perturb("contrast 0.25", image)
    assert flat.mean() == pytest.approx(image.mean(), abs=1e-6)
    assert flat.std() == pytest.approx(0.25 * image.std(), rel=1e-4)
    np.testing.assert_allclose(perturb("contrast 0", image), image.mean(), atol=1e-6)


def test_blur_is_gaussian_within_each_channel_and_repeats_the_edge():
    flat = np.broadcast_to(np.array([0.1, 0.5, 0.9], np.float32)[:, None, None], (3, 9, 9)).copy()
    np.testing.assert_allclose(perturb("blur 2", flat), flat, atol=1e-6)
    point = np.zeros((1, 31, 31), np.float32)
    point[0, 15, 15] = 1
    spread = perturb("blur 1.5", point)[0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert spread[15, 15] / spread[15, 17] == pytest.approx(np.exp(2**2 / (2 * 1.5**2)), rel=1e-4)
    np.testing.assert_array_equal(perturb("blur 0", point), point)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_costs_more_at_lower_quality(channels):
    image = smooth((channels, 16, 16))
    losses = [distance(perturb(f"jpeg {quality}", image), image) for quality in (100, 50, 5)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[0] < 0.02 * np.sqrt(image.size)
    assert losses[2] > 0.02 * np.sqrt(image.size)


def test_jpeg_of_other_channels_is_refused():
    with pytest.raises(InputError, match="expected 1 or 3 channels, got 2"):
        perturb("jpeg 50", np.zeros((2, 8, 8), np.float32))


def test_a_shift_goes_each_way_and_repeats_the_edge():
    image = picture(2)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge")
    ways = {(y, x): padded[:, 2 - y : 10 - y, 2 - x : 10 - x] for y, x in ((2, 0), (-2, 0), (0, 2), (0, -2))}
    found = set()
    for seed in range(30):
        shifted = perturb("shift 2", image, seed=seed)
        found |= {way for way, expected in ways.items() if np.array_equal(shifted, expected)}
    assert found == set(ways)
    assert np.array_equal(perturb("shift 0", image), image)
    far = perturb("shift 1000", image)
    assert min(np.ptp(far, axis=1).max(), np.ptp(far, axis=2).max()) == 0  # the edge, everywhere


@pytest.mark.parametrize("level", [0.1, 0.5, 2.0])
def test_pgd_moves_features_more_than_noise_of_its_norm(level, classifier):
    for seed in range(4):
        image = picture(seed)
        attacked = perturb(f"pgd {level}", image, seed=seed, classifier=classifier)
        norm = distance(attacked, image)
        assert 0.5 * level < norm <= level + 1e-4
        noise = [Perturbation(Family.GAUSSIAN, norm).apply(image, seed=number) for number in range(10)]
        with torch.no_grad():
            moved = classifier.features(torch.tensor(np.stack([image, attacked, *noise])))
        distances = (moved[1:] - moved[0]).norm(dim=1)
        assert distances[0] > 1.5 * distances[1:].max()


def test_pgd_follows_its_seed_and_the_classifiers_precision(classifier, precise):
    image = picture(0)
    one, other = (perturb("pgd 1", image, seed=seed, classifier=classifier) for seed in (0, 1))
    assert distance(one, other) > 1e-3
    exact = perturb("pgd 1", image, classifier=precise)
    assert exact.dtype == np.float32
    assert distance(perturb("pgd 1", image, classifier=classifier), exact) < 0.05
    assert np.array_equal(perturb("pgd 0", image, classifier=classifier), image)
    assert all(parameter.grad is None for parameter in classifier.backbone.parameters())


@pytest.mark.parametrize("family", ["pgd", "adaptive"])
def test_an_attack_asks_for_what_it_moves(family):
    with pytest.raises(InputError, match=r"expected what an attack moves, got nothing \(pass embedding=\)"):
        perturb(f"{family} 1", picture(0))


@pytest.mark.parametrize(
    "image",
    [
        np.full((1, 8, 8), 255, np.float32),
        np.full((1, 8, 8), -0.1, np.float32),
        np.full((1, 8, 8), np.nan, np.float32),
    ],
    ids=["8 bits", "negative", "NaN"],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(InputError, match=re.escape("expected a float32 image (c, h, w) in [0, 1], got")):
        perturb("brightness 0.5", image)


@given(st.sampled_from(Family), st.floats(0, 1))
def test_names_are_read_back(family, level):
    level = {Family.CLEAN: 0.0, Family.JPEG: 1.0 + round(99 * level), Family.SHIFT: 9.0 * round(level)}.get(
        family, level
    )
    perturbation = Perturbation(family, level)
    assert parse(perturbation.name) == perturbation


def test_names_read_well():
    assert [parse(text).name for text in ("clean", " gaussian 2.50 ", "jpeg 75.0")] == [
        "clean",
        "gaussian 2.5",
        "jpeg 75",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gausian 1", "did you mean 'gaussian'"),
        ("gaussian", "like 'gaussian 2.5', got 'gaussian'"),
        ("gaussian much", "like 'gaussian 2.5'"),
        ("gaussian -1", r"gaussian: expected a finite level in \[0, inf\], got -1.0"),
        ("gaussian nan", "finite"),
        ("blur inf", "finite"),
        ("brightness 1.1", r"\[0, 1\]"),
        ("contrast 2", r"\[0, 1\]"),
        ("jpeg 0", r"\[1, 100\]"),
        ("jpeg 50.5", "whole"),
        ("shift 0.5", "whole"),
        ("clean 1", r"\[0, 0\]"),
    ],
)
def test_what_is_no_perturbation_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


def test_standard_perturbations_are_every_level_in_order():
    both = standard_perturbations([Family.CLEAN, Family.GAUSSIAN])
    assert [perturbation.name for perturbation in both] == [
        "clean",
        *(f"gaussian {level:g}" for level in FAMILIES[Family.GAUSSIAN].levels),
    ]
    chosen = standard_perturbations([Family.BLUR, Family.SHIFT], levels={Family.BLUR: (3.0,)})
    assert [perturbation.name for perturbation in chosen] == ["blur 3", "shift 1", "shift 2", "shift 4"]
