import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from lowssl_core.images import BadImage, ImageLimits, decode, read_size

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


def picture(height: int = 60, width: int = 90) -> Image.Image:
    """Smooth colors with a sharp corner, so that orientation and damage both show."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 128 + 0 * rows], axis=-1)
    pixels[:20, :30] = (250, 20, 20)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def noisy(height: int = 120, width: int = 160) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing: a decompression bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as raised:
        decode(data)
    return raised.value.reason


@pytest.mark.parametrize("format_", FORMATS)
def test_decoding_gives_the_pixels_and_the_size_that_the_header_says(format_: str) -> None:
    image = picture()
    pixels = decode(encode(image, format_))
    assert pixels.dtype == np.uint8
    assert read_size(encode(image, format_)) == pixels.shape[:2] == (60, 90)
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), format_, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert read_size(data) == upright.shape[:2]
    np.testing.assert_allclose(decode(data), upright, atol=3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_color_mode_becomes_rgb(mode: str) -> None:
    image = picture().convert("RGB" if mode == "PA" else mode)
    format_ = {"CMYK": "JPEG", "YCbCr": "JPEG", "PA": "GIF"}.get(mode, "PNG")
    expected = np.asarray(image.convert("RGB")).astype(int)
    pixels = decode(encode(image, format_))
    assert pixels.shape == (60, 90, 3)
    assert np.abs(pixels - expected).mean() < 8


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)
    for format_ in ("PNG", "TIFF"):
        pixels = decode(encode(Image.fromarray(values), format_))
        np.testing.assert_allclose(pixels[..., 1], values / 257, atol=0.51)


def test_transparent_pixels_lie_on_white() -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert (decode(encode(image, "PNG")) == 255).all()


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(format_: str) -> None:
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    pixels = decode(encode(first, format_, save_all=True, append_images=[second]))
    assert pixels.shape == (30, 40, 3)
    assert (pixels.mean(axis=(0, 1)) // 50 == (5, 0, 0)).all()


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_reduced_jpeg_is_the_shrunk_image(reduce: int, progressive: bool) -> None:
    image = picture(117, 163)
    pixels = decode(encode(image, quality=95, progressive=progressive), reduce=reduce)
    expected = image.resize((-(-163 // reduce), -(-117 // reduce)), Image.Resampling.BOX)
    assert pixels.shape == np.asarray(expected).shape
    assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_a_reduced_cmyk_jpeg_is_the_shrunk_image(reduce: int) -> None:
    image = picture(117, 163).convert("CMYK")
    pixels = decode(encode(image, quality=95), reduce=reduce)
    expected = image.convert("RGB").resize((-(-163 // reduce), -(-117 // reduce)), Image.Resampling.BOX)
    assert pixels.shape == np.asarray(expected).shape
    assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 4


def test_other_formats_ignore_the_reduction() -> None:
    assert decode(encode(picture(), "PNG"), reduce=4).shape == (60, 90, 3)
    with pytest.raises(ValueError, match="divide by 1, 2, 4 or 8"):
        decode(encode(picture()), reduce=3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}], ids=str)
def test_a_jpeg_cut_anywhere_is_refused(options: dict[str, Any]) -> None:
    data = encode(noisy(), **options)
    assert decode(data).shape == (120, 160, 3)
    for kept in np.linspace(0.05, 0.97, 24):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * kept)])
    assert reason(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("format_", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_other_formats_cut_in_the_middle_are_refused(format_: str) -> None:
    data = encode(noisy(), format_)
    for kept in (0.2, 0.5, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * kept)])


def test_a_cut_jpeg_is_refused_though_its_thumbnail_is_whole() -> None:
    thumbnail = encode(picture(16, 24))
    exif = b"Exif\x00\x00" + thumbnail
    data = encode(noisy())
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert decode(data).shape == (120, 160, 3)
    with pytest.raises(BadImage):
        decode(data[: len(data) * 2 // 3])


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    assert decode(encode(picture()) + b"appended by a phone" * 20).shape == (60, 90, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"hello, this is text" * 10, bytes(500), b"\xff\xd8\xff\xe0" * 9])
def test_what_is_no_image_is_refused_by_both_functions(data: bytes) -> None:
    for function in (decode, read_size):
        with pytest.raises(BadImage) as raised:
            function(data)
        assert len(raised.value.reason) < 80


@pytest.mark.parametrize("format_", FORMATS)
def test_only_the_formats_asked_for_are_read(format_: str) -> None:
    data, others = encode(picture(), format_), tuple(other for other in FORMATS if other != format_)
    np.testing.assert_array_equal(decode(data, formats=(format_,)), decode(data))
    if format_ != "JPEG":  # its bytes say so themselves
        with pytest.raises(BadImage, match="no image format"):
            decode(data, formats=others)


def test_zero_sized_and_tiny_images_are_refused() -> None:
    data = bytearray(encode(picture()))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = bytes(4)
    assert reason(bytes(data)) == "zero-sized"
    assert reason(encode(picture(4, 90))).startswith("tiny: 90x4")
    assert reason(encode(picture(1, 1), "PNG")).startswith("tiny")


@pytest.mark.parametrize("size", [(13_000, 13_000), (60_000, 60_000), (30_000, 20)])
def test_huge_images_are_refused_by_their_header_alone(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the image was decoded"))
    for function in (decode, read_size):
        with pytest.raises(BadImage, match="huge"):
            function(png_header(*size))


def test_a_huge_jpeg_is_refused_by_its_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("the image was decoded"))
    data = bytearray(encode(picture()))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(data)).startswith("huge: 60000x60000")


def test_limits_can_be_set() -> None:
    assert decode(encode(picture()), limits=ImageLimits(max_pixels=60 * 90)).shape == (60, 90, 3)
    with pytest.raises(BadImage, match="huge"):
        decode(encode(picture()), limits=ImageLimits(max_pixels=60 * 90 - 1))
    with pytest.raises(ValueError, match="min_side"):
        ImageLimits(min_side=0)


@pytest.mark.parametrize("format_", FORMATS)
def test_damaged_bytes_raise_nothing_but_bad_image(format_: str) -> None:
    whole, rng = encode(noisy(24, 32), format_), np.random.default_rng(0)
    for _ in range(150):
        data = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, min(len(data), 400), 3)
        data[places] = rng.integers(0, 256, 3)
        for function in (decode, read_size):
            with suppress(BadImage):
                function(data.tobytes())
