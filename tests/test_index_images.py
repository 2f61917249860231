import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import ExifTags, Image

from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.index.sources import images
from tmm_engine.index.sources.images import FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, decode_image, natural_shape

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
TURNS = {  # EXIF orientation -> what makes the stored pixels upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_without_pixels(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


@pytest.mark.parametrize("format_", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_bytes_and_pil_images_give_the_pixels_that_were_saved(tmp_path, format_):
    content = encoded(Image.fromarray(RGB), format_, **({"lossless": True} if format_ == "WEBP" else {}))
    path = tmp_path / "image.bin"
    path.write_bytes(content)
    for source in (path, str(path), content, Image.open(io.BytesIO(content)), Image.fromarray(RGB)):
        decoded = decode_image(source)
        np.testing.assert_array_equal(decoded, RGB.transpose(2, 0, 1))
        assert decoded.flags.writeable
        assert decoded.flags.c_contiguous
        assert natural_shape(source) == decoded.shape


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied(format_, orientation):
    options = {"lossless": True} if format_ == "WEBP" else {}
    content = encoded(Image.fromarray(RGB), format_, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(content)) as image:
        # Pillow turns TIFFs upright itself, so theirs are the pixels that were saved
        stored = RGB if format_ == "TIFF" else np.asarray(image)
    np.testing.assert_array_equal(decode_image(content), TURNS[orientation](stored).transpose(2, 0, 1))
    assert natural_shape(content) == decode_image(content).shape


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return image


def pixels_of(image: Image.Image | bytes) -> list[list[int]]:
    decoded = decode_image(image)
    return decoded[:, 0].T.tolist()  # the first row's pixels, each a list of its channels


def test_every_mode_is_converted_as_documented():
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    assert pixels_of(Image.fromarray(np.array([[False, True]]))) == [[0], [255]]
    assert pixels_of(Image.fromarray(np.array([[3, 200]], np.uint8))) == [[3], [200]]
    assert pixels_of(palette_image()) == [red, blue]
    assert pixels_of(Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)])) == [[255]]
    assert pixels_of(Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 255)])) == [[100]]
    assert pixels_of(Image.new("RGBA", (1, 1), (0, 0, 255, 0))) == [white]
    assert pixels_of(Image.new("RGBA", (1, 1), (0, 0, 255, 255))) == [blue]
    assert pixels_of(Image.new("RGBA", (1, 1), (0, 0, 255, 51))) == [[204, 204, 255]]
    assert pixels_of(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == [red]
    assert pixels_of(Image.new("HSV", (1, 1), (0, 255, 255))) == [red]
    np.testing.assert_allclose(pixels_of(Image.new("RGB", (1, 1), "red").convert("YCbCr")), [red], atol=2)


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_transparent_palette_entry_becomes_white(transparency):
    content = encoded(palette_image(), "PNG", transparency=transparency)
    assert pixels_of(content) == [[255, 0, 0], [255, 255, 255]]


def test_a_transparent_grey_becomes_white_and_stays_one_channel():
    content = encoded(Image.fromarray(np.array([[10, 20]], np.uint8)), "PNG", transparency=20)
    assert pixels_of(content) == [[10], [255]]


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32"])
def test_16_bits_are_scaled_not_clipped(dtype):
    values = np.array([[0, 128, 129, 256, 257, 40000, 65535]])
    image = Image.fromarray(values.astype(dtype))
    assert decode_image(image)[0, 0].tolist() == np.rint(values[0] / 257).astype(int).tolist()


def test_a_16_bit_file_is_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tiff", "a.pgm"):
        Image.fromarray(ramp).save(tmp_path / name)
        np.testing.assert_array_equal(decode_image(tmp_path / name)[0], np.rint(ramp / 257))
        assert natural_shape(tmp_path / name) == (1, 8, 8)


@pytest.mark.parametrize(("most", "bits"), [(255, 8), (256, 12), (4095, 12), (4096, 16), (65535, 16)])
def test_fewer_bits_than_16_are_not_nearly_black(most, bits):
    values, assumed = np.array([[0, most // 2, most]]), list[str]()
    image = Image.fromarray(values.astype(np.uint16))
    expected = np.rint(values[0] * 255 / ((1 << bits) - 1)).astype(int).tolist()
    assert decode_image(image, assumed=assumed)[0, 0].tolist() == expected
    assert [f"read as {bits} bits" in said for said in assumed] == ([] if bits == 16 else [True])


def test_open_files_are_read_from_their_beginning_and_left_where_they_were(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    stream = io.BytesIO()
    stream.write(content)
    with (tmp_path / "a.png").open("rb") as file:
        for source in (stream, file, bytearray(content), memoryview(content)):
            np.testing.assert_array_equal(decode_image(source), decode_image(content))
            assert natural_shape(source) == natural_shape(content)
    assert stream.tell() == len(content)
    for wrong, message in ((io.BytesIO(), "0 bytes"), (io.StringIO("x"), "binary mode"), (file, "open it again")):
        with pytest.raises(ImageError, match=message):
            decode_image(wrong)


def test_rounding_does_not_put_floats_out_of_range():
    array = np.full((1, 2, 2), 1.0000001)
    assert decode_image(array).tolist() == [[[255, 255], [255, 255]]]
    assert decode_image(array - 1.0000002).max() == 0
    with pytest.raises(ImageError, match=r"got 1\.0001 to 1\.0001"):
        decode_image(np.full((1, 2, 2), 1.0001))


def test_integers_and_floats_out_of_range_are_refused():
    for values in (np.array([[-1, 5]], np.int32), np.array([[65536]], np.int32)):
        with pytest.raises(ImageError, match=r"0\.\.65535"):
            decode_image(Image.fromarray(values))
    assert pixels_of(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))) == [[0], [128], [255]]
    for value in (1.01, -0.1, np.nan):
        with pytest.raises(ImageError, match=r"in \[0, 1\]"):
            decode_image(Image.fromarray(np.array([[value]], np.float32)))


def test_a_mode_without_a_known_conversion_is_refused():
    with pytest.raises(ImageError, match=r"expected a mode of .*got LAB"):
        decode_image(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(format_):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format_ == "WEBP" else {}
    content = encoded(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    assert decode_image(content)[:, 0, 0].tolist() == [255, 0, 0]


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    target=st.tuples(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16"]),
)
def test_any_size_and_mode_is_brought_to_any_shape(size, target, mode):
    assert decode_image(Image.new(mode, size), shape=target).shape == target


def test_resizing_crops_the_centre_and_leaves_the_right_size_alone():
    wide = Image.fromarray(np.random.default_rng(2).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    for image, size, box in (
        (wide, (30, 10), (10, 0, 20, 10)),
        (wide.rotate(90, expand=True), (10, 30), (0, 10, 10, 20)),
    ):
        resized_then_cropped = np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop(box)).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode_image(image, shape=(3, 10, 10)), resized_then_cropped)
    np.testing.assert_array_equal(decode_image(Image.fromarray(RGB), shape=(3, 5, 7)), RGB.transpose(2, 0, 1))


def test_resizing_antialiases():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = decode_image(Image.fromarray(stripes), shape=(1, 8, 8))
    assert np.abs(small.astype(int) - 127).max() <= 12


def test_grey_becomes_three_equal_channels_and_colour_its_luma():
    np.testing.assert_array_equal(decode_image(Image.fromarray(GREY), shape=(3, 5, 7)), np.stack([GREY] * 3))
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode_image(Image.fromarray(RGB), shape=(1, 5, 7))[0], luma, atol=1)


@given(
    pixels=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)), channels=st.sampled_from([1, 3])
)
def test_array_layouts_and_types_agree(pixels, channels):
    expected = np.stack([pixels] * channels)
    shape = expected.shape
    assume(shape != (3, 3, 3))  # nothing tells which of the axes are the channels
    forms = [expected, expected.transpose(1, 2, 0), expected / 255, (expected / 255).astype(np.float16)]
    forms += [torch.from_numpy(expected), torch.from_numpy(expected / 255).requires_grad_()]
    forms += [torch.from_numpy(expected / 255).half(), pixels] if channels == 1 else []
    for form in forms:
        before = form.detach().clone() if isinstance(form, torch.Tensor) else form.copy()
        decoded = decode_image(form, shape=shape)
        np.testing.assert_array_equal(decoded, expected)
        decoded[:] = 0
        assert (form == before).all()
        assert natural_shape(expected) == shape or channels == 1


def test_ambiguous_arrays_are_channels_first_unless_the_shape_says_otherwise():
    array = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(decode_image(array), array)
    np.testing.assert_array_equal(decode_image(array, shape=(3, 3, 4)), array.transpose(2, 0, 1))


def test_bfloat16_tensors_are_read():
    assert decode_image(torch.ones(1, 2, 2, dtype=torch.bfloat16)).tolist() == [[[255, 255], [255, 255]]]


@pytest.mark.parametrize("value", [1.0001, -1e-3, np.nan, np.inf, 255.0])
def test_floats_outside_0_1_are_refused(value):
    array = np.zeros((3, 4, 4))
    array[0, 0, 0] = value
    for pixels in (array, torch.from_numpy(array)):
        with pytest.raises(ImageError, match=r"expected floating-point pixels in \[0, 1\], got"):
            decode_image(pixels)


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint16", "int8", "complex64", "object", "S1"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ImageError, match=r"expected pixels as uint8 .*convert"):
        decode_image(np.zeros((3, 4, 4), dtype))


@pytest.mark.parametrize("dims", [(), (4,), (4, 4, 4), (4, 4, 2), (1, 3, 4, 4), (0, 4), (3, 0, 4)])
def test_other_array_shapes_are_refused(dims):
    for call in (decode_image, natural_shape):
        with pytest.raises(ImageError, match="expected an array"):
            call(np.zeros(dims, np.uint8))


def test_an_array_of_another_size_is_an_error_that_says_both():
    with pytest.raises(ImageError, match=r"\(3, 8, 8\), got an array of shape \(3, 4, 4\); arrays are never resized"):
        decode_image(np.zeros((3, 4, 4), np.uint8), shape=(3, 8, 8))


@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 0, 4), (1, 4, -1)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(InputError, match="expected a shape"):
        decode_image(Image.fromarray(RGB), shape=shape)


def test_files_that_are_not_images_say_what_was_found(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, I am no image")
    cases = {"missing.png": "no such file", "": "a folder", "empty.png": "0 bytes", "text.png": "something else"}
    for name, message in cases.items():
        for call in (decode_image, natural_shape):
            with pytest.raises(ImageError, match=message) as caught:
                call(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)
    for content in (b"", b"hello, I am no image"):
        with pytest.raises(ImageError, match="expected"):
            decode_image(content)


def test_postscript_is_never_run():
    with pytest.raises(ImageError, match="something else"):
        decode_image(encoded(Image.fromarray(RGB), "EPS"))


@pytest.mark.parametrize("format_", FORMATS)
def test_truncated_files_are_refused(tmp_path, format_):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / "image"
    path.write_bytes(encoded(noise, format_)[:-2000])
    with pytest.raises(ImageError, match="image: expected"):
        decode_image(path)


def test_decompression_bombs_are_refused_before_decoding_and_large_images_are_not():
    limit = Image.MAX_IMAGE_PIXELS
    for side in (12_000, 20_000, 2_000_000):
        assert side**2 > MAX_PIXELS
        for call in (decode_image, natural_shape):
            with pytest.raises(ImageError, match="pixels"):
                call(png_without_pixels(side, side))
    assert limit < 10_000**2 <= MAX_PIXELS  # Pillow would warn
    bitmap = bytearray(encoded(Image.new("1", (1, 1)), "BMP"))
    bitmap[18:26] = struct.pack("<ii", 10_000, 10_000)
    assert natural_shape(bytes(bitmap)) == (1, 10_000, 10_000)
    with pytest.raises(ImageError, match="at most"):
        decode_image(Image.new("1", (12_000, 12_000)))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pillows_warnings_stay_inside_and_filters_are_restored():
    broken_exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x03" + struct.pack(">HHII", 0x010E, 2, 400, 900)
    content = encoded(Image.fromarray(RGB), "JPEG", exif=broken_exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(content)).getexif()
        assert len(caught) > 0
        caught.clear()
        filters = list(warnings.filters)
        assert decode_image(content).shape == natural_shape(content) == (3, 5, 7)
        assert not caught
        assert warnings.filters == filters


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(format_=st.sampled_from(FORMATS), data=st.data())
def test_damaged_files_give_an_image_or_an_image_error(monkeypatch, format_, data):
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)  # a damaged header may otherwise ask for gigabytes
    content = bytearray(encoded(Image.fromarray(RGB), format_))
    positions = st.integers(0, len(content) - 1)
    for position, value in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), max_size=8)):
        content[position] = value
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        assert decode_image(bytes(content), shape=(3, 6, 6)).shape == (3, 6, 6)
    except ImageError as error:
        assert "expected" in str(error)


def test_suffixes_are_lower_case_and_readable_by_pillow():
    Image.init()
    assert all(Image.registered_extensions()[suffix] in FORMATS for suffix in IMAGE_SUFFIXES - {".pbm"})
    assert all(suffix == suffix.lower() and Path(f"a{suffix}").suffix == suffix for suffix in IMAGE_SUFFIXES)
