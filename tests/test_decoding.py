import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowssl_core.encoder import Encoder, load_encoder
from lowssl_core.images import BadImage, Pixels, decode
from lowssl_core.photos import PHOTOGRAPHS, read_photograph
from lowssl_core.preprocess import Preprocess
from server.serving.decoding import Decoder, choose_reduction, find_format
from server.serving.errors import UnknownFormat
from server.serving.limits import ServingLimits

PREPROCESS = Preprocess(size=32)


def photograph(number: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(read_photograph(PHOTOGRAPHS[number])).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format_: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def make_input(image: bytes | Pixels, preprocess: Preprocess = PREPROCESS, **limits: Any) -> Pixels:
    return Decoder(ServingLimits(**limits)).make_input(image, preprocess)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("default")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(60, 40), (40, 71), (32, 300)])
def test_without_reduction_the_input_is_that_of_training_bit_for_bit(format_: str, size: tuple[int, int]) -> None:
    data = encode(photograph(1, *size), format_)
    np.testing.assert_array_equal(make_input(data), PREPROCESS(decode(data)))


def test_other_formats_than_jpeg_are_never_reduced() -> None:
    data = encode(photograph(2, 600, 500), "PNG")
    np.testing.assert_array_equal(make_input(data), PREPROCESS(decode(data)))


def test_pixels_and_their_lossless_file_give_the_same_input() -> None:
    image = photograph(3, 90, 60)
    np.testing.assert_array_equal(make_input(np.asarray(image)), make_input(encode(image, "PNG")))


@pytest.mark.parametrize(("width", "height", "reduce"), [(250, 200, 2), (1280, 853, 8), (4032, 3024, 8)])
def test_reduced_decoding_keeps_the_features(encoder: Encoder, width: int, height: int, reduce: int) -> None:
    assert choose_reduction(min(width, height), encoder.preprocess.resize) == reduce
    files = [encode(photograph(number, width, height), quality=88) for number in (1, 2)]
    full = encoder.embed_inputs(np.stack([encoder.preprocess(decode(data)) for data in files])).numpy()
    reduced = encoder.embed_inputs(np.stack([make_input(data, encoder.preprocess) for data in files])).numpy()
    lengths = np.linalg.norm(full, axis=1) * np.linalg.norm(reduced, axis=1)
    assert ((full * reduced).sum(axis=1) / lengths).mean() >= 0.99


def test_the_reduction_is_the_largest_that_leaves_enough_pixels() -> None:
    for shortest in (1, 37, 55, 256):
        for side in range(8, 3000, 7):
            shrunk = {reduce: -(-side // reduce) for reduce in (1, 2, 4, 8)}
            chosen = choose_reduction(side, shortest)
            assert chosen == 1 or shrunk[chosen] >= shortest
            assert all(left < shortest for reduce, left in shrunk.items() if reduce > chosen)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(50, 40), (640, 480)])
def test_an_image_is_upright_whatever_its_orientation_says(orientation: int, size: tuple[int, int]) -> None:
    image, exif = photograph(1, *size), Image.Exif()
    exif[0x0112] = orientation
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's transposition that undoes the orientation
    upright = image.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else image
    difference = make_input(encode(image, quality=95, exif=exif)) - PREPROCESS(np.asarray(upright)).astype(int)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(Image.new("RGB", (9, 9)), "GIF"), "GIF"),
        (encode(Image.new("RGB", (9, 9)), "TIFF"), "TIFF"),
        (encode(Image.new("RGB", (9, 9)), "BMP"), "BMP"),
        (encode(Image.new("RGB", (9, 9)), "JPEG2000"), "JPEG 2000"),
        (encode(Image.new("RGB", (16, 16)), "ICO"), "ICO"),
        (encode(Image.new("RGB", (16, 16)), "AVIF"), "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "MP4"),
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\x03\x04" + bytes(30), "ZIP"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip"),
        (b"\x93NUMPY\x01\0", "npy"),
        (b'  {"image": "aGk="}', "JSON"),
        (b"<!DOCTYPE html><title>no</title>", "HTML"),
        (b"\n<html><svg></svg>", "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><!-- a --><svg width="9"/>', "SVG"),
        (b"<rss/>", "XML"),
        (b"any text", None),
        (bytes(99), None),
    ],
    ids=str,
)
def test_other_formats_are_refused_by_name(data: bytes, name: str | None) -> None:
    assert find_format(data) == name
    with pytest.raises(UnknownFormat) as raised:
        make_input(data)
    seen = f"the format is {name}" if name else "no image"
    assert raised.value.reason == f"{seen}; accepted are JPEG, PNG and WebP"


def test_bytes_are_not_read_as_another_format_than_their_first_ones_say() -> None:
    # Pillow reads any bytes with this in its place as a Photo CD.
    data = b"\xff\xd8\xff".ljust(2048, b"\0") + b"PCD_IPI" + bytes(1_000_000)
    assert decode(data).shape == (512, 768, 3)
    with pytest.raises(BadImage, match="no complete JPEG header"):
        make_input(data)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (0, 9, 3), (2, 90, 3), (1, 9, 9, 3)])
def test_arrays_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadImage):
        make_input(np.zeros(shape, np.uint8))
    with pytest.raises(BadImage, match="uint8"):
        make_input(np.zeros((20, 20, 3), np.float32))  # type: ignore[arg-type]


def test_a_jpeg_may_have_twice_the_pixels_of_others() -> None:
    image = photograph(2, 120, 100)
    assert make_input(encode(image), max_pixels=12_000).shape == (32, 32, 3)
    for data in (encode(image, "PNG"), encode(image, "WEBP"), encode(image, "WEBP", lossless=True), np.asarray(image)):
        assert make_input(data, max_pixels=24_000).shape == (32, 32, 3)
        with pytest.raises(BadImage, match="huge: 120x100"):
            make_input(data, max_pixels=23_999)
    with pytest.raises(BadImage, match="huge: 120x100"):
        make_input(encode(image), max_pixels=11_999)


def test_workers_together_decode_no_more_pixels_than_one_image_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, now, most = threading.Lock(), 0, 0

    def counted(data: bytes, **options: Any) -> Pixels:
        nonlocal now, most
        with counter:
            now += 1
            most = max(most, now)
        pixels = decode(data, **options)
        with counter:
            now -= 1
        return pixels

    monkeypatch.setattr("server.serving.decoding.decode", counted)
    decoder = Decoder(ServingLimits(max_pixels=300_000))
    data = encode(photograph(2, 380, 380), "PNG")  # two of them are less than the limit, three are more
    expected = PREPROCESS(decode(data))
    inputs: list[Pixels] = []
    threads = [
        threading.Thread(target=lambda: inputs.extend(decoder.make_input(data, PREPROCESS) for _ in range(6)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
    assert len(inputs) == 36
    assert all((one == expected).all() for one in inputs)


def scans(data: bytes) -> Iterator[bytes]:
    """The scans of a progressive JPEG with the tables before them, the end of the image left out."""
    starts = [place for place in range(len(data) - 1) if data[place : place + 2] == b"\xff\xda"]
    for start, end in zip(starts, [*starts[1:], len(data) - 2], strict=True):
        yield data[start:end]


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = encode(Image.new("L", (64, 64), 99), progressive=True)
    *_, last = scans(data)
    assert make_input(data[:-2] + last * 20 + b"\xff\xd9").shape == (32, 32, 3)
    with pytest.raises(BadImage, match="more than 100 scans"):
        make_input(data[:-2] + last * 100 + b"\xff\xd9")


@pytest.mark.parametrize("progressive", [False, True])
def test_what_cameras_add_to_a_jpeg_is_not_counted_as_scans(progressive: bool) -> None:
    data = encode(photograph(0, 90, 60), progressive=progressive)
    added = b"\xff\xe5" + (60_002).to_bytes(2, "big") + b"\xff\xda" * 30_000
    data = data[:2] + added + data[2:] + b"\xff\xda" * 1000
    assert make_input(data).shape == (32, 32, 3)
