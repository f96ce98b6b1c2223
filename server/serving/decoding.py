"""The bytes of an image file to an encoder's input, with every limit checked before the work that it bounds."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Condition

import numpy as np

from lowssl_core.images import BadImage, Pixels, decode
from lowssl_core.preprocess import Preprocess
from server.serving.errors import UnknownFormat
from server.serving.limits import ServingLimits

ACCEPTED = ("JPEG", "PNG", "WebP")

# Where a format's first bytes stand, for those that are accepted and those that people send by mistake.
_MAGIC = (
    (0, rb"\xff\xd8\xff", "JPEG"),
    (0, rb"\x89PNG\r\n\x1a\n", "PNG"),
    (0, rb"RIFF....WEBP", "WebP"),
    (0, rb"GIF8[79]a", "GIF"),
    (0, rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    (0, rb"BM.{12}", "BMP"),
    (4, rb"ftyp(?:heic|heix|hevc|hevx|heim|heis|mif1|msf1)", "HEIC"),
    (4, rb"ftyp(?:avif|avis)", "AVIF"),
    (4, rb"ftyp", "MP4"),
    (0, rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL"),
    (0, rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (0, rb"\0\0[\x01\x02]\0", "ICO"),
    (0, rb"8BPS", "PSD"),
    (0, rb"%PDF-", "PDF"),
    (0, rb"PK[\x03\x05]", "ZIP"),
    (0, rb"\x1f\x8b", "gzip"),
    (0, rb"\x93NUMPY", "npy"),
    (0, rb"\s*[{\[]", "JSON"),
)
_PATTERNS = tuple((start, re.compile(magic, re.DOTALL), name) for start, magic, name in _MAGIC)
_HEAD = 512

# Programs write about 10 scans; each costs a pass over the whole image, however few bytes it has.
_MAX_SCANS = 100
# Files have some tens; Pillow reads each in Python, and stray bytes between them one by one.
_MAX_MARKERS = _MAX_CHUNKS = 10_000
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Their scans take some bits for each block, so that a file can hold but few.
_SEQUENTIAL_HUFFMAN = (0xC0, 0xC1)


def find_format(data: bytes) -> str | None:
    """What a file's first bytes show it to be, "JPEG" or "GIF" for instance; None for what is not known."""
    head = data[:_HEAD]
    found = next((name for start, pattern, name in _PATTERNS if pattern.match(head, start)), None)
    if found is None and (text := head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()).startswith(b"<"):
        found = "SVG" if b"<svg" in text else "HTML" if b"<html" in text or b"<!doctype html" in text else "XML"
    return found


class Decoder:
    """Makes inputs of images within limits; one is shared by all workers.

    Args:
        limits: of an image. Of `max_pixels` no more are decoded at a time by all workers together, so that a few
            images which are small as files cannot fill the memory.
    """

    def __init__(self, limits: ServingLimits) -> None:
        self._limits = limits
        self._free_pixels = limits.max_pixels
        self._freed = Condition()

    def make_input(self, image: bytes | Pixels, preprocess: Preprocess) -> Pixels:
        """An encoder's input (size, size, 3) uint8 of one image: a file's bytes, or pixels (H, W, 3) uint8.

        A JPEG is decoded at half, a quarter or an eighth of its size where its short side then still has what
        `preprocess` shrinks it to.

        Raises:
            BadImage: it cannot be used; `UnknownFormat` for bytes of another format.
        """
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise BadImage(f"an array must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
            self._limits.image.check(image.shape[0], image.shape[1])
            return preprocess(image)
        if not image:
            raise BadImage("empty file")
        format_ = find_format(image)
        if format_ not in ACCEPTED:
            seen = f"the format is {format_}" if format_ else "no image"
            raise UnknownFormat(f"{seen}; accepted are {', '.join(ACCEPTED[:-1])} and {ACCEPTED[-1]}")
        if format_ == "JPEG":
            return preprocess(self._decode_jpeg(image, preprocess.resize))
        height, width = (_read_png if format_ == "PNG" else _read_webp)(image)
        self._limits.image.check(height, width)
        with self._hold(height * width):
            return preprocess(decode(image, limits=self._limits.image, formats=(format_,)))

    def _decode_jpeg(self, data: bytes, shortest: int) -> Pixels:
        limits = self._limits.jpeg
        height, width = _read_jpeg(data)
        limits.check(height, width)
        # A pixel of a JPEG takes 3 bytes while it is decoded at a reduced size, of another format 12 and more.
        with self._hold(height * width // 4):
            reduce = choose_reduction(min(height, width), shortest)
            return decode(data, reduce=reduce, limits=limits, formats=("JPEG",))

    @contextmanager
    def _hold(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels may be decoded; a few are not worth counting."""
        if pixels < self._limits.max_pixels // 64:
            yield
            return
        with self._freed:
            self._freed.wait_for(lambda: self._free_pixels >= pixels)
            self._free_pixels -= pixels
        try:
            yield
        finally:
            with self._freed:
                self._free_pixels += pixels
                self._freed.notify_all()


def choose_reduction(side: int, shortest: int) -> int:
    """The largest of 8, 4, 2 and 1 that leaves a side of at least `shortest` pixels when it divides `side`."""
    return next((reduce for reduce in (8, 4, 2) if -(-side // reduce) >= shortest), 1)


def _read_jpeg(data: bytes) -> tuple[int, int]:
    """Height and width, as stored; BadImage for a file whose markers would keep a decoder busy for long."""
    kind, height, width, steps = 0, 0, 0, 0
    markers = _jpeg_markers(data)
    for marker, start, skipped in markers:
        steps += 1 + skipped
        if steps > _MAX_MARKERS:
            raise BadImage(f"more than {_MAX_MARKERS:,} markers or stray bytes")
        if marker == _START_OF_SCAN:
            break
        if marker in _FRAMES:
            kind, (height, width) = marker, struct.unpack(">HH", data[start + 3 : start + 7].ljust(4, b"\0"))
    else:
        raise BadImage("unreadable: no complete JPEG header")
    if not kind:
        raise BadImage("unreadable: no JPEG frame")
    # Looking for markers within scans is slow, and few files even have the bytes often enough.
    if kind not in _SEQUENTIAL_HUFFMAN and data.count(b"\xff\xda", start) >= _MAX_SCANS:
        others = (marker for marker, _, _ in markers if marker == _START_OF_SCAN)
        if len(list(islice(others, _MAX_SCANS))) == _MAX_SCANS:
            raise BadImage(f"more than {_MAX_SCANS} scans")
    return height, width


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Each marker up to the end of the image, where its segment starts, and how many bytes stood before it."""
    position = 2
    while (found := _JPEG_MARKER.search(data, position)) and found[1][0] != _END_OF_IMAGE:
        marker, start = found[1][0], found.end()
        yield marker, start, found.start() - position
        position = start
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # these stand alone, the others say their length
            position += int.from_bytes(data[start : start + 2], "big")


def _read_png(data: bytes) -> tuple[int, int]:
    """Height and width; BadImage for a file of very many chunks."""
    if data[12:16] != b"IHDR" or len(data) < 24:
        raise BadImage("unreadable: no PNG header")
    position, chunks = 8, 0
    while position < len(data) and data[position + 4 : position + 8] != b"IEND":
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        chunks += 1
        if chunks > _MAX_CHUNKS:
            raise BadImage(f"more than {_MAX_CHUNKS:,} chunks")
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def _read_webp(data: bytes) -> tuple[int, int]:
    """Height and width of the canvas (RFC 9649, sections 2.5 to 2.7)."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X" and len(body) == 10:
        return 1 + int.from_bytes(body[7:10], "little"), 1 + int.from_bytes(body[4:7], "little")
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) == 10:
        return int.from_bytes(body[8:10], "little") & 0x3FFF, int.from_bytes(body[6:8], "little") & 0x3FFF
    raise BadImage("unreadable: no WebP header")
