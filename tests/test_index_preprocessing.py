"""What a picture becomes: every way to resize and crop, held to Pillow and torchvision."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.v2 import functional

from tmm_engine.index.errors import ImageError, ModelError
from tmm_engine.index.models import preprocessing
from tmm_engine.index.models.architectures import ModelSpec
from tmm_engine.index.models.preprocessing import (
    Interpolation,
    OddCrop,
    Preprocessing,
    Resampler,
    Transparency,
    shape_of,
)
from tmm_engine.index.sources.images import decode_image

SIDES = [(37, 53), (53, 37), (24, 24), (25, 90), (11, 17)]
LEVELS = 256


def picture(height, width, *, channels=3):
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / 3 + c) + np.cos(y / 2 - c) for c in range(channels)]
    pixels = np.stack([(63 * plane + 127) for plane in planes], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def planes(image):
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_the_shorter_side_and_the_centre_are_torchvisions(side, interpolation):
    image = picture(*side)
    theirs = Compose([Resize(24, InterpolationMode(interpolation)), CenterCrop((21, 20))])(image)
    ours = Preprocessing((3, 21, 20), preprocessing.Resize.SHORTEST, (24, 24), Interpolation(interpolation))(image)
    np.testing.assert_array_equal(ours, planes(theirs))


@pytest.mark.parametrize("side", SIDES)
def test_both_sides_and_a_crop_larger_than_the_picture(side):
    image = picture(*side)
    theirs = Compose([Resize((18, 15), InterpolationMode.BICUBIC), CenterCrop((21, 12))])(image)
    ours = Preprocessing((3, 21, 12), preprocessing.Resize.EXACT, (18, 15))(image)
    np.testing.assert_array_equal(ours, planes(theirs))


@pytest.mark.parametrize("side", SIDES)
def test_torchvisions_arithmetic_on_tensors_is_another_than_pillows(side):
    image = picture(*side)
    tensor = functional.resize(functional.pil_to_tensor(image), [20, 20], antialias=True)
    made = {
        each: Preprocessing((3, 20, 20), preprocessing.Resize.EXACT, (20, 20), Interpolation.BILINEAR, each)(image)
        for each in Resampler
    }
    np.testing.assert_array_equal(made[Resampler.TORCHVISION], tensor.numpy())
    np.testing.assert_allclose(made[Resampler.PIL].astype(int), tensor.numpy(), atol=1)


def test_grey_goes_through_torchvision_too():
    image = picture(30, 40, channels=1)
    grey = Preprocessing((1, 8, 8), preprocessing.Resize.EXACT, (8, 8), resampler=Resampler.TORCHVISION)(image)
    assert grey.shape == (1, 8, 8)
    np.testing.assert_array_equal(
        Preprocessing((3, 8, 8), preprocessing.Resize.EXACT, (8, 8), resampler=Resampler.TORCHVISION)(image),
        [*grey] * 3,
    )


def test_without_resizing_an_odd_rest_is_cut_off_where_it_says():
    image = picture(9, 12)
    pixels = planes(image)
    rounded = Preprocessing((3, 6, 5), preprocessing.Resize.NONE)(image)
    floored = Preprocessing((3, 6, 5), preprocessing.Resize.NONE, odd_crop=OddCrop.FLOOR)(image)
    np.testing.assert_array_equal(rounded, pixels[:, 2:8, 4:9])
    np.testing.assert_array_equal(floored, pixels[:, 1:7, 3:8])


def test_a_bare_shape_stands_for_the_default_and_transparency_is_white_or_ignored():
    image = picture(16, 20)
    np.testing.assert_array_equal(
        decode_image(image, shape=(3, 8, 8)), decode_image(image, shape=Preprocessing((3, 8, 8)))
    )
    clear = image.convert("RGBA")
    clear.putalpha(0)
    seen = Preprocessing((3, 16, 20), transparency=Transparency.IGNORED)
    np.testing.assert_array_equal(decode_image(clear, shape=seen), planes(image))
    assert decode_image(clear, shape=(3, 16, 20)).min() == LEVELS - 1
    assert shape_of(seen) == shape_of((3, 16, 20)) == (3, 16, 20)


def test_a_photograph_is_turned_upright_before_it_is_resized(tmp_path):
    image = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    made = Preprocessing((3, 10, 10), preprocessing.Resize.SHORTEST, (12, 12))
    np.testing.assert_array_equal(
        decode_image(tmp_path / "turned.png", shape=made), made(image.rotate(-90, expand=True))
    )


def test_a_thread_of_a_picture_is_refused_before_it_is_made_huge():
    with pytest.raises(ImageError, match="expected at most 134217728 pixels with a shorter side of 4096"):
        decode_image(
            Image.new("L", (100_000, 2)), shape=Preprocessing((1, 8, 8), preprocessing.Resize.SHORTEST, (4096,) * 2)
        )


def test_it_survives_json_and_what_is_damaged_is_refused():
    made = Preprocessing((3, 21, 20), preprocessing.Resize.SHORTEST, (24, 24), Interpolation.LANCZOS)
    content = json.loads(json.dumps(made.to_json()))
    assert Preprocessing.from_json(content) == made
    for wrong in (
        [],
        content | {"extra": 1},
        content | {"resize": "crooked"},
        content | {"shape": [3, 21]},
        content | {"shape": [4, 21, 20]},
        content | {"size": [24, 25]},
        content | {"size": ["24", "24"]},
        content | {"size": [0, 0]},
        content | {"shape": [3, 1 << 20, 1 << 20]},
    ):
        with pytest.raises(ModelError, match="expected"):
            Preprocessing.from_json(wrong)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ((preprocessing.Resize.COVER, (0, 0)), {"resampler": Resampler.TORCHVISION, "odd_crop": OddCrop.FLOOR}),
        (
            (preprocessing.Resize.NONE, (0, 0)),
            {"resampler": Resampler.TORCHVISION, "interpolation": Interpolation.BILINEAR},
        ),
        ((preprocessing.Resize.EXACT, (16, 15)), {"odd_crop": OddCrop.FLOOR}),
    ],
)
def test_what_has_no_effect_cannot_be_told_apart_but_stays_as_an_index_of_before_has_it(settings, idle):
    plain, given = Preprocessing((3, 16, 15), *settings), Preprocessing((3, 16, 15), *settings, **idle)
    assert given == plain
    stored = plain.to_json() | idle
    before = Preprocessing.from_json(stored)
    assert before.to_json() == stored
    np.testing.assert_array_equal(before(picture(21, 20)), plain(picture(21, 20)))


def test_the_default_preprocessing_of_a_model_is_none_at_all():
    spec = ModelSpec("resnet18", 2, 3, False, (8, 9), (0.0,) * 3, (1.0,) * 3)
    assert replace(spec, preprocessing=Preprocessing((3, 8, 9))) == spec
    assert replace(spec, preprocessing=Preprocessing((3, 8, 9), preprocessing.Resize.EXACT, (8, 9))) != spec
