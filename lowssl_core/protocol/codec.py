"""Codecs of a flat array: fp32, fp16, int8 in blocks or the largest values alone."""

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.manifest import FloatArray, Manifest, check_flat

Codec = Literal["fp32", "fp16", "int8", "top-k"]
CODECS: tuple[Codec, ...] = get_args(Codec)

BLOCK = 1024
"""Values that share one scale in int8."""

_GAP = np.iinfo(np.uint16).max
_HALF = float(np.finfo(np.float16).max)
_EXPONENT = 100  # of the unit: times fp16's and int8's largest it stays within fp32
_PREFIX = struct.Struct("<Bf")  # codec, unit
_BLOCK_RECORD = np.dtype([("scale", "<f2"), ("values", "i1", (BLOCK,))])


def encode(array: FloatArray, codec: Codec, *, share: float = 0.01) -> bytes:
    """A flat array (N,) as bytes that say how to read them.

    One byte for the codec and a power of two, the unit, as fp32, that brings the largest number stored as fp16 near
    2^15: deltas of a small learning rate would be lost below fp16's smallest. Then, little-endian,

    - fp32: the values (unit 1);
    - fp16: the values / unit;
    - int8: for each block of 1024 values an fp16 scale, then the values / unit / scale as int8, the last block filled
      up with zeros;
    - top-k: for each of the share's largest values, in order, its distance from the last one as uint16, then all
      values / unit as fp16. A distance above 65535 is bridged by zeros.

    Args:
        array: what to encode.
        codec: one of `CODECS`.
        share: how many of the values top-k keeps, above 0 up to 1.

    Raises:
        BadUpdate: a value is not finite.
        ValueError: no such codec or share.
    """
    if codec not in CODECS or not 0 < share <= 1:
        raise ValueError(f"codec {codec!r}, share {share}; codecs are {', '.join(CODECS)}, a share is above 0 up to 1")
    largest = float(np.abs(array).max(initial=0))
    if not math.isfinite(largest):
        raise BadUpdate("an array with values that are not finite cannot be sent")
    # What int8 stores as fp16 are scales, 127 times smaller than values.
    exponent = math.frexp(largest)[1] - (21 if codec == "int8" else 15)
    unit = 1.0 if codec == "fp32" else math.ldexp(1.0, min(max(exponent, -_EXPONENT), _EXPONENT))
    header = _PREFIX.pack(CODECS.index(codec), unit)
    match codec:
        case "fp32":
            return header + array.astype("<f4").tobytes()
        case "fp16":
            return header + _halves(array, unit)
        case "int8":
            return header + _encode_int8(array, unit)
        case "top-k":
            return header + _encode_top(array, unit, share)


def decode(data: bytes, size: int) -> FloatArray:
    """The array (size,) that `encode` turned into `data`.

    Nothing is allocated before the data's length is known to fit `size`.

    Raises:
        BadUpdate: no such codec, a wrong length, a value or scale that is not finite, a position out of range.
    """
    packed = _unwrap(memoryview(data), size)
    array = np.empty(size, dtype=np.float32)
    packed.fill(array)
    return array


def encode_flat(flat: FloatArray, manifest: Manifest, codec: Codec, *, share: float = 0.01) -> bytes:
    """A manifest's flat array (size,): its parameters by `codec`, its statistics as they are, in fp32.

    Statistics are values, not deltas: rounded to their block's largest, small variances would become zero. They are
    about a hundredth of a network.

    Raises:
        BadUpdate: a value is not finite.
    """
    check_flat(flat, manifest)
    statistics = flat[manifest.trained_size :]
    if not np.isfinite(statistics).all():
        raise BadUpdate("an array with values that are not finite cannot be sent")
    return encode(flat[: manifest.trained_size], codec, share=share) + statistics.astype("<f4").tobytes()


def decode_flat(data: bytes, manifest: Manifest) -> FloatArray:
    """The flat array (size,) that `encode_flat` turned into `data`; BadUpdate as `decode` raises it."""
    tail = 4 * (manifest.size - manifest.trained_size)
    if len(data) < tail:
        raise BadUpdate(f"payload: {len(data)} bytes; the statistics alone take {tail}")
    cut = len(data) - tail
    packed = _unwrap(memoryview(data)[:cut], manifest.trained_size)
    statistics = _finite(np.frombuffer(data, "<f4", offset=cut))
    flat = np.empty(manifest.size, dtype=np.float32)
    packed.fill(flat[: manifest.trained_size])
    flat[manifest.trained_size :] = statistics
    return flat


def largest_payload(manifest: Manifest) -> int:
    """Bytes that no payload of a manifest exceeds: a longer one is refused unread."""
    return _PREFIX.size + 4 * manifest.size + _BLOCK_RECORD.itemsize


def _halves(values: FloatArray, unit: float) -> bytes:
    halves = np.clip(values / np.float32(unit), -_HALF, _HALF).astype(np.dtype("<f2"))
    return bytes(halves.tobytes())


def _encode_int8(array: FloatArray, unit: float) -> bytes:
    records = np.zeros(-(-len(array) // BLOCK), dtype=_BLOCK_RECORD)
    blocks = np.zeros((len(records), BLOCK), dtype=np.float32)
    blocks.reshape(-1)[: len(array)] = array
    blocks /= np.float32(unit)
    wanted = np.minimum(np.abs(blocks).max(axis=1, initial=0) / 127, np.float32(_HALF / 2))
    scales = wanted.astype("<f2")
    # Rounded up, so that the largest value does not pass 127.
    scales = np.where(scales < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
    records["scale"] = scales
    blocks /= np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    records["values"] = np.clip(np.rint(blocks), -127, 127).astype(np.int8)
    return records.tobytes()


def _encode_top(array: FloatArray, unit: float, share: float) -> bytes:
    count = min(len(array), max(1, round(share * len(array))))
    # The order of equals decides, not the selection's whim: the same array gives the same bytes everywhere.
    threshold = np.partition(np.abs(array), len(array) - count)[len(array) - count] if len(array) else 0
    above = np.flatnonzero(np.abs(array) > threshold)
    equal = np.flatnonzero(np.abs(array) == threshold)[: count - len(above)]
    kept = np.sort(np.concatenate([above, equal]))
    gaps = np.diff(kept, prepend=-1)
    stops = [np.arange(kept[i] - gaps[i] + _GAP, kept[i], _GAP) for i in np.flatnonzero(gaps > _GAP)]
    places = np.sort(np.concatenate([kept, *stops]))
    sparse = np.zeros_like(array)
    sparse[kept] = array[kept]
    return np.diff(places, prepend=-1).astype("<u2").tobytes() + _halves(sparse[places], unit)


@dataclass(frozen=True)
class _Packed:
    """An array's codec, unit and bytes, of the right length."""

    codec: Codec
    unit: float
    body: memoryview

    def fill(self, array: FloatArray) -> None:
        """Decode into `array` (size,), in place: the one large array that reading takes."""
        match self.codec:
            case "fp32":
                array[:] = _finite(np.frombuffer(self.body, "<f4"))
            case "fp16":
                np.multiply(_finite(np.frombuffer(self.body, "<f2")), np.float32(self.unit), out=array)
            case "int8":
                self._fill_int8(array)
            case "top-k":
                self._fill_top(array)

    def _fill_int8(self, array: FloatArray) -> None:
        records = np.frombuffer(self.body, dtype=_BLOCK_RECORD)
        scales = _finite(records["scale"].astype(np.float32))
        if (scales < 0).any():
            raise BadUpdate("payload: a scale below zero")
        scales *= np.float32(self.unit)
        whole = len(array) // BLOCK
        np.multiply(records["values"][:whole], scales[:whole, None], out=array[: whole * BLOCK].reshape(whole, BLOCK))
        if rest := len(array) - whole * BLOCK:
            array[-rest:] = records["values"][whole, :rest] * scales[whole]

    def _fill_top(self, array: FloatArray) -> None:
        count = len(self.body) // 4
        gaps = np.frombuffer(self.body[: 2 * count], "<u2")
        values = _finite(np.frombuffer(self.body[2 * count :], "<f2"))
        places = np.cumsum(gaps, dtype=np.int64) - 1
        if count and (gaps.min() == 0 or places[-1] >= len(array)):
            raise BadUpdate(f"payload: a position of top-k out of range or twice; there are {len(array)} values")
        array[:] = 0
        array[places] = values * np.float32(self.unit)


def _unwrap(data: memoryview, size: int) -> _Packed:
    """Read what stands in front of an array, and check that as many bytes follow as `size` values take."""
    if len(data) < _PREFIX.size or data[0] >= len(CODECS):
        raise BadUpdate("payload: begins with no known codec")
    codec = CODECS[data[0]]
    unit: float = _PREFIX.unpack_from(data)[1]
    body = data[_PREFIX.size :]
    if not 2.0**-_EXPONENT <= unit <= 2.0**_EXPONENT or math.frexp(unit)[0] != 0.5 or (codec == "fp32" and unit != 1):
        raise BadUpdate(f"payload: unit {unit}; it is a power of two from 2^-{_EXPONENT} to 2^{_EXPONENT}, 1 for fp32")
    if codec == "top-k":
        if len(body) % 4 or len(body) > 4 * size:
            raise BadUpdate(f"payload: {len(body)} bytes of top-k; they are 4 for each value kept, of {size} at most")
        return _Packed(codec, unit, body)
    length = {"fp32": 4 * size, "fp16": 2 * size, "int8": -(-size // BLOCK) * _BLOCK_RECORD.itemsize}[codec]
    if len(body) != length:
        raise BadUpdate(f"payload: {len(body)} bytes of {codec}; {size} values take {length}")
    return _Packed(codec, unit, body)


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise BadUpdate("payload: a value that is not finite")
    return values
