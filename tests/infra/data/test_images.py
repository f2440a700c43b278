import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.data.images import FORMATS, decode, encode_png, measure, pixels_of
from tests.infra.data.zoo import encode, picture

PICTURE = picture(0)
ENCODED = {kind: encode(PICTURE, kind) for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes(kind):
    pixels = decode(ENCODED[kind])
    assert pixels.dtype == np.uint8
    assert pixels.shape == PICTURE.shape
    assert pixels.flags.writeable
    assert measure(ENCODED[kind]) == PICTURE.shape[:2]
    lossy = kind in ("JPEG", "WEBP", "GIF", "AVIF", "HEIF", "JXL")
    assert np.abs(pixels.astype(int) - PICTURE).mean() < (8 if lossy else 1e-9)


def test_png_goes_round():
    assert np.array_equal(decode(encode_png(PICTURE)), PICTURE)


def test_files_images_and_arrays_are_the_same_picture():
    alpha = np.linspace(0, 255, 40 * 30).reshape(40, 30, 1).astype(np.uint8)
    rgba = np.concatenate([picture(2, 40, 30), alpha], axis=2)
    seen = decode(encode_png(rgba))
    assert (seen[0, 0] == 255).all(), "transparency lies on white"
    held = Image.fromarray(rgba).quantize(16)
    for same in (rgba, Image.fromarray(rgba), Image.open(io.BytesIO(encode_png(rgba))), rgba.astype(np.int64)):
        assert np.array_equal(pixels_of(same), seen)
    buffer = io.BytesIO()
    held.save(buffer, "PNG")
    assert np.array_equal(pixels_of(held), decode(buffer.getvalue()))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_open_file_is_what_its_bytes_are(kind):
    assert np.array_equal(pixels_of(Image.open(io.BytesIO(ENCODED[kind]))), decode(ENCODED[kind]))


@pytest.mark.parametrize(
    "same",
    [
        PICTURE,
        PICTURE / 255,
        (PICTURE / 255).astype(np.float16),
        PICTURE.astype(np.float32),
        PICTURE.astype(np.uint16) * 257,
        PICTURE.tolist(),
    ],
)
def test_arrays_count_as_files_do(same):
    assert np.abs(pixels_of(same).astype(int) - PICTURE).max() <= (1 if getattr(same, "dtype", 0) == np.float16 else 0)
    assert np.array_equal(pixels_of(PICTURE[..., 0]), pixels_of(PICTURE[..., :1]))
    assert pixels_of(PICTURE[..., 0] > 99).max() == 255


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (3, "this is of the type int"),
        (None, "this is of the type NoneType"),
        (b"bytes", "this is of the type bytes"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"the shape \(2, 4, 4, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"the shape \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"the shape \(0, 8, 3\)"),
        (np.full((4, 4, 3), 300), "of the type int64"),
        (np.full((4, 4, 3), "a"), "of the type <U1"),
        (np.full((4, 4, 3), 1j), "of the type complex128"),
        (Image.open(io.BytesIO(ENCODED["PNG"][:-40])), "unusable image"),
    ],
)
def test_what_is_no_picture(picture, said):
    with pytest.raises(ValueError, match=said):
        pixels_of(picture)


def test_resizing_is_height_by_width_and_leaves_the_right_size_alone():
    assert decode(ENCODED["PNG"], (10, 64)).shape == (10, 64, 3)
    assert np.array_equal(decode(ENCODED["PNG"], PICTURE.shape[:2]), PICTURE)


def test_a_large_jpeg_is_resized_as_if_it_had_been_decoded_whole():
    large = encode(picture(1, 1200, 1600), "JPEG", quality=95)
    whole = Image.fromarray(decode(large)).resize((64, 48), Image.Resampling.LANCZOS)
    assert np.abs(decode(large, (48, 64)).astype(int) - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PICTURE, "PNG", exif=exif)
    turned = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.swapaxes(0, 1),
        6: np.rot90(PICTURE, -1),
        7: np.rot90(PICTURE, 2).swapaxes(0, 1),
        8: np.rot90(PICTURE),
    }[orientation]
    assert np.array_equal(decode(data), turned)
    assert measure(data) == turned.shape[:2]


GREY = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (8, 1))
DEEP = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "data",
    [
        encode(GREY),
        encode(DEEP),
        encode(DEEP, "TIFF"),
        encode(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        encode(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
        encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        encode(Image.fromarray(GREY).convert("LA")),
        encode(Image.fromarray(GREY).convert("RGBA")),
        encode(Image.fromarray(GREY).convert("P")),
        encode(Image.fromarray(GREY).convert("P"), "GIF"),
        encode(Image.fromarray(GREY).convert("CMYK"), "TIFF"),
        encode(Image.fromarray(GREY).convert("YCbCr"), "TIFF"),
    ],
    ids=["L", "I;16-png", "I;16-tiff", "I", "F-unit", "F-255", "LA", "RGBA", "P", "P-gif", "CMYK", "YCbCr"],
)
def test_every_mode_becomes_the_same_grey(data):
    pixels = decode(data)
    assert pixels.shape == (*GREY.shape, 3)
    assert np.abs(pixels.astype(int) - GREY[..., None]).max() <= 1


def test_one_bit_and_nan():
    assert set(np.unique(decode(encode(Image.fromarray(GREY).convert("1"))))) == {0, 255}
    holes = GREY.astype(np.float32)
    holes[0, 0], holes[0, 1], holes[0, 2] = np.nan, np.inf, -np.inf
    assert decode(encode(Image.fromarray(holes), "TIFF"))[0, :3, 0].tolist() == [0, 255, 0]


def test_cmyk_jpeg():
    pixels = decode(encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - PICTURE).mean() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L-key", "RGB-key", "1-key"])
def test_transparency_is_composited_over_the_background(mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    options = {}
    if mode == "P":
        image = Image.fromarray(np.array([[1, 1, 0, 0]] * 2, dtype=np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 9, 9, 9])
        options = {"transparency": 1}
    elif mode.endswith("key"):
        image = Image.fromarray(np.array([[255, 255, 0, 0]] * 2, dtype=np.uint8)).convert(mode.removesuffix("-key"))
        options = {"transparency": (255, 255, 255) if mode.startswith("RGB") else 255}
    else:
        image = image.convert(mode)
    data = encode(image, "PNG", **options) if mode != "PA" else encode(image.convert("RGBA"))
    pixels = decode(data, background=(10, 20, 30))
    assert pixels[0].tolist() == [[10, 20, 30]] * 2 + [[0, 0, 0]] * 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_stands_for_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pixels = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100))
    assert pixels[4, 4, 0] > 240
    assert pixels[4, 4, 2] < 15


def bomb(width, height):
    """A small PNG that announces many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 9_000), (60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_decompression_bombs_are_refused_by_their_header(size):
    for function in (decode, measure):
        with pytest.raises(ValueError, match="too many pixels"):
            function(bomb(*size))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"<html>404 not found</html>", "not an image: an HTML page"),
        (b"%PDF-1.4", "not an image: PDF"),
        (bytes(1000), "not an image"),
        (ENCODED["JPEG"][:400], "truncated image"),
        (ENCODED["PNG"][:200], "truncated image"),
        (ENCODED["WEBP"][:100], "truncated image"),
        (ENCODED["BMP"][:900], "truncated image"),
        (ENCODED["TIFF"][:900], "truncated image"),
        (ENCODED["GIF"][:900], "truncated image"),
        (bomb(100, 100), "truncated image"),
    ],
)
def test_refusals_have_a_short_reason(data, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        decode(data)


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("JXL", b"\xff\x0a" + bytes(100), r"unread format: JPEG XL; pip install 'rescribe\[jxl\]'"),
        ("HEIF", b"\0\0\0\x18ftypheic" + bytes(100), r"unread format: HEIC; pip install 'rescribe\[heic\]'"),
        ("AVIF", b"\0\0\0\x18ftypavif" + bytes(100), "unread format: AVIF, which this Pillow was built without"),
    ],
)
def test_a_format_that_may_be_read_is_called_unread_only_where_it_is(kind, data, reason):
    with pytest.raises(ValueError, match="^(broken|truncated) image" if kind in FORMATS else f"^{reason}$"):
        decode(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_image_is_refused_or_whole(kind):
    """Only bytes without pixels (an end mark, a checksum) may be missing."""
    data = ENCODED[kind]
    whole = decode(data)
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            pixels = decode(data[:length])
        except ValueError as error:
            assert len(str(error)) < 200  # noqa: PT017
            continue
        assert np.array_equal(pixels, whole)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12), st.binary())
def test_damaged_images_decode_or_raise_value_errors(kind, damage, extra):
    data = bytearray(ENCODED[kind])
    for place, value in damage:
        data[int(place**3 * (len(data) - 1))] = value  # more often in the header
    for function in (decode, measure):
        try:
            function(bytes(data) + extra)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017


@given(st.binary(max_size=300))
def test_garbage_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011
        decode(data)


def test_a_broken_exif_block_does_not_spoil_the_pixels():
    data = encode(PICTURE, "JPEG", exif=b"Exif\0\0garbage")
    assert decode(data).shape == PICTURE.shape
    assert measure(data) == PICTURE.shape[:2]
