"""Memory and time of a round in which a thousand simulated devices answer, for each aggregator.

    python benchmarks/aggregation.py [--devices N] [--aggregators NAME ...] [--folder DIR] [--json FILE]

Every reply goes the way of a real one: bytes, screening, aggregation. Each aggregator has a process of its own, so its
peak memory is its own too: how much the process grew, in models (fp32). Deltas take turns, so preparing them costs
nothing here. Replies that are kept on disk are flushed to it, 4 bytes for each value: the folder's disk counts.
"""

import argparse
import dataclasses
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowssl_core.protocol.codec import CODECS, encode_flat
from lowssl_core.protocol.manifest import FloatArray, Manifest
from lowssl_core.protocol.messages import Update, write_message
from server.aggregation import AGGREGATORS
from server.aggregation.quarantine import Quarantine
from server.aggregation.reply import Screened
from server.aggregation.screening import Screening, ScreeningConfig

SEED = 0
DIFFERENT_DELTAS = 8
VERSION = 1


def main(argv: Sequence[str] | None = None) -> None:
    from machine import write_report

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1000, help="how many answer (default: 1000)")
    parser.add_argument("--backbone", default="mobilenetv2", help="whose weights travel (default: mobilenetv2)")
    parser.add_argument("--codec", choices=CODECS, default="int8", help="of the replies (default: int8)")
    parser.add_argument(
        "--aggregators", nargs="+", choices=list(AGGREGATORS), default=list(AGGREGATORS), metavar="NAME"
    )
    parser.add_argument("--folder", help="where replies are kept (default: the system's folder for temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args(argv)

    manifest = backbone_manifest(options.backbone)
    settings = {
        "backbone": options.backbone,
        "values": manifest.size,
        "model_mb": round(4 * manifest.size / 1e6, 1),
        "devices": options.devices,
        "codec": options.codec,
    }
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        case = Case(manifest=manifest.to_json(), folder=Path(folder), devices=options.devices, codec=options.codec)
        write_payloads(case)
        settings["reply_mb"] = round(payload_path(case, 0).stat().st_size / 1e6, 1)
        print_head(settings)
        for name in options.aggregators:
            # A fresh process: its memory starts from nothing, and no torch is in it, as in the server's.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(run_round, (case, name)))
            print_row(results[-1])
    if options.json:
        write_report(options.json, results, settings=settings, seeds={"deltas": SEED})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One round: the manifest's JSON, a folder for its files, how many devices answer, and in which codec."""

    manifest: str
    folder: Path
    devices: int
    codec: str


def run_round(case: Case, name: str) -> dict[str, Any]:
    """Time and memory of one round with the aggregator `name`."""
    manifest = Manifest.from_json(case.manifest)
    before = peak_bytes()
    # Privacy does not compare replies with each other.
    config = ScreeningConfig() if name != "private_mean" else ScreeningConfig(comparison=None)
    screening, aggregator = Screening(config, Quarantine()), AGGREGATORS[name]().build(case.folder / "replies")
    model = initial_model(manifest)
    screening.begin(model, manifest, VERSION)
    aggregator.begin(model, manifest)
    seconds = {"screening": 0.0, "add": 0.0}
    for device in range(case.devices):
        data = arriving(case, manifest, device)
        start = time.perf_counter()
        verdicts = screening.receive(f"device-{device}", data)
        if device == case.devices - 1:
            verdicts += screening.close()
        screened = time.perf_counter()
        for verdict in verdicts:
            if isinstance(verdict, Screened):
                aggregator.add(verdict)
        seconds["screening"] += screened - start
        seconds["add"] += time.perf_counter() - screened
        verdicts.clear()
    start = time.perf_counter()
    new = aggregator.finish()
    finish = time.perf_counter() - start
    assert len(aggregator.added) == case.devices
    assert np.isfinite(new).all()
    kept = sum(path.stat().st_size for path in (case.folder / "replies").glob("*"))
    shutil.rmtree(case.folder / "replies", ignore_errors=True)
    return {
        "aggregator": name,
        "screening_ms": 1000 * seconds["screening"] / case.devices,
        "add_ms": 1000 * seconds["add"] / case.devices,
        "finish_s": finish,
        "reply_ms": 1000 * (sum(seconds.values()) + finish) / case.devices,
        "peak_models": (peak_bytes() - before) / (4 * manifest.size),
        "disk_gb": kept / 1e9,
    }


def backbone_manifest(name: str) -> Manifest:
    """The manifest of a backbone alone, without a method's head: the sizes that backbones are known by."""
    from lowssl_core.backbones import BackboneConfig
    from lowssl_core.methods import MoCoConfig
    from lowssl_core.protocol.manifest import manifest_of

    whole = manifest_of(MoCoConfig(queue_length=8).build(BackboneConfig(name=name), 8))
    entries, offset = [], 0
    for entry in whole.entries:
        if entry.name.startswith("online.backbone."):
            entries.append(dataclasses.replace(entry, offset=offset))
            offset += entry.size
    return Manifest(tuple(entries))


def initial_model(manifest: Manifest) -> FloatArray:
    """A global model: Gaussian weights, variances of 1."""
    model = np.random.default_rng(SEED).standard_normal(manifest.size, dtype=np.float32)
    model[manifest.variances] = 1
    return model


def write_payloads(case: Case) -> None:
    """Encode the deltas that take turns: alike by a cosine of about .3, norms a hundredth of the model's."""
    manifest, rng = Manifest.from_json(case.manifest), np.random.default_rng(SEED + 1)
    size = manifest.trained_size
    common = rng.standard_normal(size, dtype=np.float32)
    for index in range(DIFFERENT_DELTAS):
        flat = initial_model(manifest)
        own = rng.standard_normal(size, dtype=np.float32)
        flat[:size] = 0.01 * (np.float32(0.3**0.5) * common + np.float32(0.7**0.5) * own)
        payload_path(case, index).write_bytes(encode_flat(flat, manifest, case.codec))


def payload_path(case: Case, index: int) -> Path:
    return case.folder / f"{index}.payload"


def arriving(case: Case, manifest: Manifest, device: int) -> bytes:
    """The bytes that a device sends."""
    update = Update(
        round=VERSION,
        base_version=VERSION,
        device=f"device-{device}",
        update_id=f"{device:05}",
        manifest=manifest.hash,
        weight=256.0,
        payload=payload_path(case, device % DIFFERENT_DELTAS).read_bytes(),
    )
    return write_message(update)


def peak_bytes() -> int:
    """The most memory this process has had, by Linux; getrusage would count the parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def print_head(settings: dict[str, Any]) -> None:
    """The machine, the settings, and the table's first line."""
    from machine import machine_report

    print(f"{machine_report()['processor']}; one process")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    columns = ("screening ms", "add ms", "finish s", "ms a reply", "peak models", "disk GB")
    print(f"\n{'aggregator':<14}" + "".join(f"{column:>14}" for column in columns))


def print_row(row: dict[str, Any]) -> None:
    figures = (row["screening_ms"], row["add_ms"], row["finish_s"], row["reply_ms"], row["peak_models"], row["disk_gb"])
    print(f"{row['aggregator']:<14}" + "".join(f"{figure:>14.1f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
