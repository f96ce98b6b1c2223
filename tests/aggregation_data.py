"""A small manifest and replies made up from a seed, for the tests of aggregation."""

from collections.abc import Sequence

import numpy as np

from lowssl_core.protocol.codec import encode_flat
from lowssl_core.protocol.manifest import Entry, FloatArray, Kind, Manifest
from lowssl_core.protocol.messages import Update, write_message
from server.aggregation.reply import Screened

LAYERS: tuple[tuple[str, tuple[int, ...], Kind], ...] = (
    ("conv.weight", (50, 40), "parameter"),
    ("norm.weight", (50,), "parameter"),
    ("norm.bias", (50,), "parameter"),
    ("head.weight", (8, 50), "parameter"),
    ("norm.running_mean", (50,), "batchnorm_mean"),
    ("norm.running_var", (50,), "batchnorm_variance"),
    ("scale", (3,), "buffer"),
)


def small_manifest(unit_rows: Sequence[str] = ()) -> Manifest:
    entries, offset = [], 0
    for name, shape, kind in LAYERS:
        entry = Entry(name=name, shape=shape, dtype="float32", offset=offset, kind=kind, unit_rows=name in unit_rows)
        entries.append(entry)
        offset += entry.size
    return Manifest(tuple(entries))


MANIFEST = small_manifest()


def global_model(seed: int = 0) -> FloatArray:
    rng = np.random.default_rng([seed, 1])
    flat = rng.standard_normal(MANIFEST.size).astype(np.float32)
    flat[MANIFEST.variances] = rng.uniform(0.5, 2, 50)
    return flat


def deltas(count: int, seed: int = 0, *, likeness: float = 0.3) -> list[FloatArray]:
    """Flat updates whose deltas have about this cosine to each other, norms near 1, and believable statistics."""
    rng = np.random.default_rng([seed, 2])
    size = MANIFEST.trained_size
    common = rng.standard_normal(size) / np.sqrt(size)
    updates = []
    for _ in range(count):
        own = rng.standard_normal(size) / np.sqrt(size)
        flat = global_model()
        flat[:size] = rng.uniform(0.8, 1.2) * (np.sqrt(likeness) * common + np.sqrt(1 - likeness) * own)
        flat[MANIFEST.means] += 0.1 * rng.standard_normal(50).astype(np.float32)
        flat[MANIFEST.variances] *= rng.uniform(0.8, 1.25, 50).astype(np.float32)
        updates.append(flat)
    return updates


def reply(flat: FloatArray, index: int, *, weight: float = 1.0, staleness: int = 0, clip: float = 1.0) -> Screened:
    return Screened(
        device=f"device-{index}", update_id=f"{index:04}", weight=weight, staleness=staleness, clip=clip, flat=flat
    )


def message(
    flat: FloatArray, index: int, *, version: int = 7, manifest: Manifest = MANIFEST, **changes: object
) -> bytes:
    """An update's bytes as device `index` would send it for a model version, lossless."""
    facts = {
        "round": version,
        "base_version": version,
        "device": f"device-{index}",
        "update_id": f"device-{index}-{version}",
        "manifest": manifest.hash,
        "weight": 64.0,
        "payload": encode_flat(flat, manifest, "fp32"),
    }
    return write_message(Update(**facts | changes))
