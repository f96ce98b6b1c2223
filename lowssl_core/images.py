"""Image bytes to RGB uint8, with limits checked before any decoding and every defect named in a few words."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

_END_OF_IMAGE = b"\xff\xd9"


class BadImage(Exception):  # noqa: N818 - a fact about the data, to be set aside, rather than an error of the program
    """An image that cannot be used; `reason` says why in a few words fit for a list of files set aside."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotEnoughMemory(BadImage):
    """An image that there was no memory to decode: another time it may be a good one."""

    def __init__(self) -> None:
        super().__init__("not enough memory to decode it")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """The sizes that are accepted, in pixels; they are read from the header, so refusing an image is free."""

    min_side: int = 8
    max_side: int = 20_000
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        if not 1 <= self.min_side <= self.max_side:
            raise ValueError(f"min_side {self.min_side} must lie in 1..max_side ({self.max_side})")
        if self.max_pixels < self.min_side**2:
            raise ValueError(f"max_pixels {self.max_pixels} leaves no image of min_side {self.min_side}")

    def check(self, height: int, width: int) -> None:
        """Raise BadImage unless an image of `height` x `width` pixels is accepted."""
        if height == 0 or width == 0:
            raise BadImage("zero-sized")
        if min(height, width) < self.min_side:
            raise BadImage(f"tiny: {width}x{height}, shorter than {self.min_side} pixels")
        if max(height, width) > self.max_side or height * width > self.max_pixels:
            raise BadImage(f"huge: {width}x{height}, more than {self.max_pixels:,} pixels or {self.max_side:,} a side")


_DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class _JpegHeader:
    """What the markers before a JPEG's first scan say."""

    height: int
    width: int
    precision: int
    components: int
    has_exif: bool
    scan_start: int


def read_size(data: bytes, limits: ImageLimits = _DEFAULT_LIMITS) -> tuple[int, int]:
    """(height, width) as `decode` will return them, from the header alone, EXIF orientation applied.

    Raises BadImage for empty, unreadable, zero-sized, tiny and huge images.
    """
    header = _jpeg_header(data)
    if header is None or header.has_exif:
        with _open(data) as image:
            width, height = image.size
            limits.check(height, width)
            try:
                orientation = image.getexif().get(0x0112, 1)  # Pillow decodes a PNG for this
            except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
                raise BadImage("truncated" if "truncated" in str(error) else f"unreadable: {error}") from error
            if orientation >= 5:  # orientations 5 to 8 lie on their side
                width, height = height, width
    else:
        height, width = header.height, header.width
    limits.check(height, width)
    return height, width


def decode(
    data: bytes,
    *,
    reduce: int = 1,
    limits: ImageLimits = _DEFAULT_LIMITS,
    formats: tuple[str, ...] | None = None,
) -> Pixels:
    """RGB uint8 (H, W, 3), upright; transparency is laid on white, of an animation the first frame is taken.

    `reduce` in 1, 2, 4, 8 asks for an image with sides divided by it (rounded up), which JPEG can decode in less
    time; other formats ignore it, so look at the size that comes back. `formats`, by Pillow's names, are the only ones
    to read; None for every one that Pillow knows.
    Raises BadImage for empty, unreadable, truncated, zero-sized, tiny and huge data.
    """
    if reduce not in (1, 2, 4, 8):
        raise ValueError(f"reduce is {reduce}; JPEG decoding can divide by 1, 2, 4 or 8")
    header = _jpeg_header(data)
    # OpenCV is the fastest decoder at hand, but knows nothing of CMYK profiles and takes cut files in silence.
    if (
        header is not None
        and header.precision == 8
        and header.components in (1, 3)
        and data.rfind(_END_OF_IMAGE, header.scan_start) >= 0
    ):
        limits.check(header.height, header.width)
        return _decode_jpeg(data, reduce, header)
    return _decode_with_pillow(data, reduce, limits, formats)


def _decode_jpeg(data: bytes, reduce: int, header: _JpegHeader) -> Pixels:
    # OpenCV names the reductions 16, 32, 64 (gray) and adds 1 for BGR; 256 asks for RGB instead of that 1.
    flags = cv2.IMREAD_COLOR_RGB | (0 if reduce == 1 else 8 * reduce)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise NotEnoughMemory from None
        pixels = None
    if pixels is None:
        # libjpeg does not say so when it has no memory, of which a progressive image takes two bytes a coefficient.
        try:
            np.empty((2 * header.components + 3) * header.height * header.width, np.uint8)
        except MemoryError:
            raise NotEnoughMemory from None
        raise BadImage("unreadable: damaged JPEG data")
    return pixels.astype(np.uint8, copy=False)


def _decode_with_pillow(data: bytes, reduce: int, limits: ImageLimits, formats: tuple[str, ...] | None) -> Pixels:
    with _open(data, formats) as image:
        limits.check(image.height, image.width)
        if reduce > 1:  # JPEG alone follows
            image.draft(None, (image.width // reduce, image.height // reduce))
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # more than 8 bits: keep the upper ones, where Pillow would clip at 255
        values = np.nan_to_num(np.asarray(image, np.float64))
        top = max(values.max(), 1e-9) if image.mode == "F" else 65535
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _open(data: bytes, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Read with Pillow, as one of `formats`: whatever it raises, there and in the with-block, becomes a BadImage."""
    if not data:
        raise BadImage("empty file")
    try:
        # Pillow warns of odd metadata and of large images; the limits above say what is refused.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        raise BadImage("unreadable: no image format that is known") from error
    except Image.DecompressionBombError as error:
        raise BadImage("huge") from error
    except BadImage:
        raise
    except MemoryError:
        raise NotEnoughMemory from None
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        cut = isinstance(error, EOFError) or "truncated" in str(error)
        raise BadImage("truncated" if cut else f"unreadable: {error or type(error).__name__}") from error


def _jpeg_header(data: bytes) -> _JpegHeader | None:
    """Walk the markers up to the first scan; None if this is no JPEG or its header is broken (Pillow then says why)."""
    if data[:2] != b"\xff\xd8":
        return None
    position, frame, has_exif = 2, None, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        # Frame headers are C0 to CF, less the tables DHT, JPG and DAC.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 10 <= len(data):
            frame = struct.unpack(">BHHB", data[position + 4 : position + 10])
        elif marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            has_exif = True
        elif marker == 0xDA:
            if frame is None:
                return None
            precision, height, width, components = frame
            return _JpegHeader(height, width, precision, components, has_exif, position + 2 + length)
        position += 2 + length
    return None
