"""Codecs lose what they say they lose, error feedback makes up for it, and broken bytes are refused."""

import struct
import tracemalloc

import numpy as np
import pytest
from aggregation_data import MANIFEST, deltas

from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.codec import (
    BLOCK,
    CODECS,
    decode,
    decode_flat,
    encode,
    encode_flat,
    largest_payload,
)


def gaussian(size=100_000, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def relative_error(array, codec, **options):
    back = decode(encode(array, codec, **options), len(array))
    assert back.dtype == np.float32
    return np.linalg.norm(back - array) / np.linalg.norm(array)


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e6])
def test_errors_are_those_of_the_formats_at_every_scale(scale):
    array = gaussian(scale=scale)
    assert relative_error(array, "fp32") == 0
    assert relative_error(array, "fp16") < 2**-11
    assert relative_error(array, "int8") == pytest.approx(0.0078, abs=0.0003)


@pytest.mark.parametrize(("share", "energy"), [(0.01, 0.085), (0.05, 0.28), (0.1, 0.44)])
def test_the_largest_values_keep_the_energy_that_a_gaussian_has_there(share, energy):
    assert 1 - relative_error(gaussian(), "top-k", share=share) ** 2 == pytest.approx(energy, abs=0.01)


@pytest.mark.parametrize(("codec", "part"), [("fp32", 1), ("fp16", 0.5), ("int8", 0.25), ("top-k", 0.05)])
def test_sizes_are_the_codecs_part_of_fp32(codec, part):
    array = gaussian(100 * BLOCK)
    assert len(encode(array, codec, share=0.05)) / array.nbytes == pytest.approx(part, rel=0.01)


def test_int8_rounds_each_value_to_its_blocks_nearest_step():
    array = gaussian(3 * BLOCK + 7)
    array[BLOCK : 2 * BLOCK] *= 1e-4  # a block has a scale of its own
    back = decode(encode(array, "int8"), len(array))
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        step = np.abs(block).max() / 127
        assert np.abs(back[start : start + BLOCK] - block).max() <= 0.5 * step * (1 + 2**-9)


def test_top_k_keeps_the_largest_values_alone_and_bridges_wide_gaps():
    array = np.zeros(1_000_000, dtype=np.float32)
    places = [3, 65_538, 65_539, 400_000, 531_070, 662_141, 999_999]
    array[places] = [1, -2, 3, 4, -5, 6, 7]
    back = decode(encode(array, "top-k", share=7 / len(array)), len(array))
    np.testing.assert_array_equal(back, array)
    top = decode(encode(array, "top-k", share=3 / len(array)), len(array))
    assert np.flatnonzero(top).tolist() == [531_070, 662_141, 999_999]


def test_of_equal_values_the_first_are_kept():
    back = decode(encode(np.full(10, -2.0, dtype=np.float32), "top-k", share=0.3), 10)
    assert back.tolist() == [-2] * 3 + [0] * 7


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("array", [np.zeros(0), np.zeros(5), np.array([3.0]), np.array([1e-45]), np.array([-3.4e38])])
def test_arrays_at_the_edges_survive(codec, array):
    array = array.astype(np.float32)
    back = decode(encode(array, codec, share=1.0), len(array))
    assert back.shape == array.shape
    assert np.isfinite(back).all()
    assert (np.sign(back) * np.sign(array) >= 0).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(codec, value):
    array = np.array([1, value], dtype=np.float32)
    with pytest.raises(BadUpdate, match="not finite"):
        encode(array, codec)
    flat = deltas(1)[0]
    flat[MANIFEST.means.start] = value
    with pytest.raises(BadUpdate, match="not finite"):
        encode_flat(flat, MANIFEST, codec)


@pytest.mark.parametrize("codec", ["int8", "top-k"])
def test_what_is_lost_does_not_grow_where_it_is_sent_with_the_next_one(codec):
    owed = np.zeros(5000, dtype=np.float32)
    for seed in range(30):
        delta = gaussian(5000, seed=seed)
        owed = delta + owed - decode(encode(delta + owed, codec, share=0.2), 5000)
    # Without feedback the error of 30 rounds would.
    assert np.linalg.norm(owed) < (0.01 if codec == "int8" else 3) * np.linalg.norm(delta)


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_array_is_the_same_bytes(codec):
    assert encode(gaussian(100), codec) == encode(gaussian(100), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_statistics_are_never_rounded(codec):
    flat = deltas(1)[0]
    flat[MANIFEST.variances] = np.geomspace(1e-12, 1e6, 50)
    data = encode_flat(flat, MANIFEST, codec)
    assert len(data) <= largest_payload(MANIFEST)
    back = decode_flat(data, MANIFEST)
    np.testing.assert_array_equal(back[MANIFEST.trained_size :], flat[MANIFEST.trained_size :])


def halves(*values):
    return np.array(values, dtype="<f2").tobytes()


def gaps(*values):
    return np.array(values, dtype="<u2").tobytes()


def of(codec, unit, body):
    return struct.pack("<Bf", CODECS.index(codec), unit) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known codec"),
        (b"\x04" + bytes(20), "no known codec"),
        (of("fp32", 1, b"")[:4], "no known codec"),
        (of("fp16", 0, halves(1, 2)), "unit"),
        (of("fp16", 3, halves(1, 2)), "unit"),
        (of("fp16", -1, halves(1, 2)), "unit"),
        (of("fp16", np.nan, halves(1, 2)), "unit"),
        (of("fp16", 2.0**120, halves(1, 2)), "unit"),
        (of("fp32", 2, bytes(8)), "unit"),
        (of("fp32", 1, bytes(7)), "7 bytes"),
        (of("fp32", 1, bytes(12)), "12 bytes"),
        (of("fp32", 1, np.array([1, np.nan], "<f4").tobytes()), "not finite"),
        (of("fp16", 1, halves(1, np.inf)), "not finite"),
        (of("int8", 1, bytes(BLOCK)), "bytes of int8"),
        (of("int8", 1, halves(np.nan) + bytes(BLOCK)), "not finite"),
        (of("int8", 1, halves(-1) + bytes(BLOCK)), "below zero"),
        (of("top-k", 1, bytes(3)), "4 for each"),
        (of("top-k", 1, bytes(12)), "4 for each"),
        (of("top-k", 1, gaps(0) + halves(1)), "out of range"),
        (of("top-k", 1, gaps(3) + halves(1)), "out of range"),
        (of("top-k", 1, gaps(1, 0) + halves(1, 1)), "out of range or twice"),
        (of("top-k", 1, gaps(1) + halves(np.nan)), "not finite"),
    ],
)
def test_bytes_that_are_no_array_of_two_values_are_refused(data, reason):
    with pytest.raises(BadUpdate, match=reason):
        decode(data, 2)


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_payloads_are_refused_or_finite(codec):
    rng = np.random.default_rng(0)
    whole = encode_flat(deltas(1)[0], MANIFEST, codec)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        if rng.random() < 0.3:
            del data[rng.integers(len(data)) :]
        try:
            assert np.isfinite(decode_flat(bytes(data), MANIFEST)).all()
        except BadUpdate:
            continue


def test_a_payload_of_the_wrong_size_allocates_nothing():
    data = of("top-k", 1, gaps(*[65535] * 50) + halves(*[1] * 50))
    tracemalloc.start()
    with pytest.raises(BadUpdate):
        decode(data, 20)
    with pytest.raises(BadUpdate):
        decode(of("int8", 1, b"12"), 2**40)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="fp32, fp16, int8, top-k"):
        encode(gaussian(3), "int4")
    with pytest.raises(ValueError, match="share"):
        encode(gaussian(3), "top-k", share=0)
