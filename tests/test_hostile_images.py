"""Each file gives an input or a BadImage with a reason, nothing else; bombs are refused without memory."""

import gzip
import io
import json
import multiprocessing
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lowssl_core.images import BadImage
from lowssl_core.photos import PHOTOGRAPHS, read_photograph
from lowssl_core.preprocess import Preprocess
from server.serving.decoding import Decoder
from server.serving.errors import UnknownFormat
from server.serving.limits import ServingLimits

PREPROCESS = Preprocess(size=32)
WIDTH, HEIGHT = 96, 72
# Bombs that can be read without harm.
HARMLESS = ("markers after the frame", "too much data", "lying exif")


def photograph() -> Image.Image:
    return Image.fromarray(read_photograph(PHOTOGRAPHS[1])).resize((WIDTH, HEIGHT))


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def make_input(data: bytes) -> np.ndarray:
    return Decoder(ServingLimits()).make_input(data, PREPROCESS)


def outcome(data: bytes) -> str:
    """ "input", or the reason."""
    try:
        made = make_input(data)
    except BadImage as error:
        reason = error.reason
    else:
        reason = "input"
        assert made.shape == (32, 32, 3)
        assert made.dtype == np.uint8
    assert 0 < len(reason) < 200
    assert "\n" not in reason
    return reason


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, *others: bytes, depth: int = 8, color: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many zero bytes, compressed a thousandfold, without ever being there at once."""

    def block(size: int) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(bytes(size)) + packer.flush(zlib.Z_FULL_FLUSH)

    whole, rest = divmod(count, 2**20)
    checksum = struct.pack(">HH", count % 65521, 1)
    return b"\x78\xda" + block(2**20) * whole + block(rest) + b"\x03\x00" + checksum


def webp(kind: bytes, body: bytes) -> bytes:
    part = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(part)) + b"WEBP" + part


def jpeg_of_size(width: int, height: int, **options: Any) -> bytes:
    """A small JPEG whose header announces another size."""
    data = bytearray(encode(photograph(), **options))
    frame = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


@cache
def good() -> dict[str, bytes]:
    """Unusual files that must be read."""
    image, rng = photograph(), np.random.default_rng(0)
    second = image.rotate(180)
    palette = image.quantize(16)
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "x" * 1000, zip=True)
    rows = b"".join(b"\0" + row.tobytes() for row in rng.integers(0, 256, (HEIGHT, 6 * WIDTH), np.uint8))
    cmyk = encode(image.convert("CMYK"))
    return {
        "cmyk jpeg": cmyk,
        "ycck jpeg": patched(cmyk, b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
        "gray jpeg": encode(image.convert("L")),
        "progressive jpeg": encode(image, progressive=True),
        "jpeg with restarts": encode(image, restart_marker_blocks=1),
        "jpeg of one bit": encode(image.convert("1")),
        "16-bit gray png": encode(Image.fromarray(deep), "PNG"),
        "16-bit rgb png": png(WIDTH, HEIGHT, zlib.compress(rows), depth=16),
        "palette with transparency": encode(palette, "PNG", transparency=3),
        "palette with alpha": encode(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "gray with transparency": encode(image.convert("L"), "PNG", transparency=5),
        "1-bit png": encode(image.convert("1"), "PNG"),
        "interlaced animation": encode(image, "PNG", save_all=True, append_images=[second] * 3),
        "animation without its default image": encode(
            image, "PNG", save_all=True, append_images=[second] * 3, default_image=True
        ),
        "animated webp": encode(image, "WEBP", save_all=True, append_images=[second] * 3),
        "lossless webp with alpha": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "long side": encode(Image.new("RGB", (20_000, 8)), "PNG"),
        "png with text": encode(image, "PNG", pnginfo=info),
        "jpeg with much added": encode(image, comment=b"x" * 60_000) + bytes(300_000),
    }


@cache
def bad() -> dict[str, bytes]:
    """Files that must be refused."""
    image, rng = photograph(), np.random.default_rng(1)
    jpeg, small_png, lossy = encode(image), encode(image, "PNG"), encode(image, "WEBP")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("image.jpg", jpeg)
    broken_crc = bytearray(small_png)
    broken_crc[-20] ^= 0xFF
    noise = rng.integers(0, 256, 3000, np.uint8).tobytes()
    return {
        "nothing": b"",
        "one byte": b"\xff",
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "half a png": small_png[: len(small_png) // 2],
        "half a webp": lossy[: len(lossy) // 2],
        "jpeg marker alone": b"\xff\xd8\xff",
        "jpeg of markers": b"\xff\xd8" + b"\xff\xe0" * 500,
        "jpeg of fill bytes": b"\xff\xd8" + b"\xff" * 100_000,
        "jpeg without a frame": patched(jpeg, b"\xff\xc0", b"\xff\xfe"),
        "jpeg of no lines": jpeg_of_size(96, 0),
        "png signature alone": b"\x89PNG\r\n\x1a\n",
        "png without a header": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", zlib.compress(bytes(99))),
        "png of no columns": png(0, 9, zlib.compress(bytes(9))),
        "png with a wrong checksum": bytes(broken_crc),
        "png of an unknown color": png(20, 20, zlib.compress(bytes(2000)), color=5),
        "webp head alone": lossy[:16],
        "webp of an unknown chunk": webp(b"VP9 ", lossy[20:]),
        "webp without a frame": webp(b"VP8X", bytes(4) + bytes([19, 0, 0, 19, 0, 0])),
        "a pixel": encode(Image.new("RGB", (1, 1)), "PNG"),
        "a line": encode(Image.new("RGB", (1, 20_000)), "PNG"),
        "zip": archive.getvalue(),
        "gzip": gzip.compress(jpeg),
        "html": b"<!doctype html><img src='https://example.org/a.jpg'>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "xml entities": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
        "pdf": b"%PDF-1.7 1 0 obj",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
        "gif": encode(image, "GIF"),
        "tiff": encode(image, "TIFF"),
        "a url": b"https://example.org/image.jpg",
        "a pickle": b"\x80\x04\x95",
        "noise": noise,
        "noise after jpeg": b"\xff\xd8\xff" + noise,
        "noise after png": b"\x89PNG\r\n\x1a\n" + noise,
        "noise after png header": small_png[:33] + noise,
        "noise after webp": lossy[:30] + noise,
    }


def bombs() -> dict[str, bytes]:
    """Small files that ask for much memory or time."""
    image = photograph()
    *_, last_scan = encode(Image.new("L", (64, 64)), progressive=True).split(b"\xff\xda")
    giant_text = zeros(100_000_000)
    long_text = b"Title\0\0" + giant_text
    long_international = b"Title\0\1\0\0\0" + giant_text
    huge = zeros(13_000 * (3 * 13_000 + 1))
    return {
        "13,000 x 13,000": png(13_000, 13_000, huge),
        "5,001 x 5,000 in 16 bits": png(5_001, 5_000, huge, depth=16),
        "100,000 long": png(1, 100_000, zlib.compress(bytes(400_000))),
        "animation's canvas": webp(b"VP8X", b"\2\0\0\0" + b"\xff\xff\xff" * 2),
        "lossless webp": webp(b"VP8L", b"\x2f\xff\xff\xff\xff" + bytes(20)),
        "lossy webp": webp(b"VP8 ", b"\0\0\0\x9d\1\x2a\xff\x3f\xff\x3f" + bytes(20)),
        "jpeg": jpeg_of_size(65_535, 65_535),
        "progressive jpeg": jpeg_of_size(65_535, 65_535, progressive=True),
        "jpeg of 50,005,000 pixels": jpeg_of_size(7_300, 6_850),
        "jpeg of many scans": jpeg_of_size(7_000, 7_000, progressive=True)[:-2]
        + (b"\xff\xda" + last_scan[:-2]) * 9_999,
        "text": png(64, 64, zlib.compress(bytes(64 * 193)), chunk(b"zTXt", long_text)),
        "international text": png(64, 64, zlib.compress(bytes(64 * 193)), chunk(b"iTXt", long_international)),
        "much text": png(64, 64, zlib.compress(bytes(64 * 193)), *[chunk(b"zTXt", b"a\0\0" + zeros(2**20))] * 100),
        "color profile": png(64, 64, zlib.compress(bytes(64 * 193)), chunk(b"iCCP", long_text)),
        "too much data": png(64, 64, huge),
        "fill bytes": b"\xff\xd8" + b"\xff" * 10_000_000,
        "stuffed bytes": b"\xff\xd8\xff\xe0\0\2" + b"\xff\0" * 5_000_000 + encode(image)[2:],
        "markers": b"\xff\xd8" + b"\xff\xe0\0\2" * 2_400_000 + encode(image)[2:],
        "markers after the frame": encode(image)[:-2] + b"\xff\xe0\0\2" * 2_400_000,
        "chunks": patched(encode(image, "PNG"), b"\0\0\0\0IEND", chunk(b"tIME", b"") * 800_000 + b"\0\0\0\0IEND"),
        "parts of data": png(96, 72, b"", chunk(b"IDAT", b"") * 800_000),
        "lying exif": encode(image, exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 60_000),
    }


@pytest.mark.parametrize("name", good())
def test_unusual_files_are_read(name: str) -> None:
    assert outcome(good()[name]) == "input"


@pytest.mark.parametrize("name", bad())
def test_what_is_damaged_or_no_image_is_refused_with_a_reason(name: str) -> None:
    assert outcome(bad()[name]) != "input"


@pytest.mark.parametrize("name", ["cmyk jpeg", "ycck jpeg", "16-bit gray png", "16-bit rgb png"])
def test_unusual_files_show_what_others_read_in_them(name: str) -> None:
    data = good()[name]
    with Image.open(io.BytesIO(data)) as image:
        values = np.round(np.asarray(image) / 257) if image.mode == "I;16" else np.asarray(image.convert("RGB"))
    pixels = np.stack([values] * 3, -1) if values.ndim == 2 else values
    assert np.abs(make_input(data) - PREPROCESS(pixels.astype(np.uint8)).astype(int)).max() <= 1


@pytest.mark.parametrize(
    "name", ["interlaced animation", "animation without its default image", "animated webp", "progressive jpeg"]
)
def test_an_animation_shows_its_first_frame(name: str) -> None:
    assert np.abs(make_input(good()[name]) - PREPROCESS(np.asarray(photograph())).astype(int)).mean() < 4


def damaged(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    files = list(good().values())
    for number in range(count):
        data = np.frombuffer(files[number % len(files)], np.uint8).copy()
        places = rng.integers(0, min(len(data), 2000), 1 + number % 5)
        data[places] ^= rng.integers(1, 256, len(places), np.uint8)
        yield data[: rng.integers(1, len(data))].tobytes() if number % 3 == 0 else data.tobytes()


def test_files_damaged_anywhere_give_an_input_or_a_reason() -> None:
    outcomes = [outcome(data) for data in damaged(500)]
    assert outcomes.count("input") > 50
    assert len(set(outcomes)) > 10


def refuse_in_little_memory(files: dict[str, bytes], answer: Callable[[str], None]) -> None:
    """In a process of its own: what becomes of each file, and by how many bytes the peak of memory grew with it."""
    outcome(encode(photograph()))
    outcome(encode(photograph(), "PNG"))
    outcome(encode(photograph(), "WEBP"))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    found = {}
    for name, data in files.items():
        before = resource.getrusage(resource.RUSAGE_SELF)
        result = outcome(data)
        after = resource.getrusage(resource.RUSAGE_SELF)
        grown = (after.ru_maxrss - before.ru_maxrss) * 1024
        found[name] = (result, grown)
    answer(json.dumps(found))


def test_bombs_are_refused_without_memory() -> None:
    files = bombs()
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=refuse_in_little_memory, args=(files, send.send))
    process.start()
    found = json.loads(receive.recv())
    process.join()
    for name, (result, grown) in found.items():
        assert (result == "input") == (name in HARMLESS), (name, result)
        assert grown < 20_000_000, (name, grown)


def test_what_is_no_image_is_told_apart_from_a_damaged_one() -> None:
    for name in ("zip", "gzip", "html", "svg", "pdf", "gif", "tiff", "noise", "a url"):
        with pytest.raises(UnknownFormat, match="accepted are JPEG, PNG and WebP"):
            make_input(bad()[name])
    for name in ("half a jpeg", "half a png", "half a webp", "a pixel", "nothing"):
        with pytest.raises(BadImage) as raised:
            make_input(bad()[name])
        assert not isinstance(raised.value, UnknownFormat)
