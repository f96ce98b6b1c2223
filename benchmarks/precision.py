"""What fp16 and int8 cost and bring: features beside fp32's, k-NN accuracy, milliseconds an image, size of the file.

    python benchmarks/precision.py [ENCODER ...] [--data PATH] [--size PIXELS] [--json FILE]

int8 is calibrated on images of the train split and judged on images of the test split. The files take turns, image by
image, on one thread; times are medians.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_report, write_report
from onnx import ModelProto, TensorProto
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lowssl_core.encoder import DEFAULT, Encoder, load_encoder
from lowssl_core.export.checks import GraphRunner, features_in_mixed_batches, measure_agreement
from lowssl_core.export.graph import to_onnx
from lowssl_core.export.precision import to_fp16, to_int8
from lowssl_core.export.speed import milliseconds_an_image
from lowssl_core.images import Pixels, decode
from lowssl_core.neighbors import knn_accuracy, nearest
from lowssl_core.preprocess import Preprocess
from lowssl_core.sources import Source, open_source

SEED = 0
NEIGHBORS = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "encoders", nargs="*", default=[DEFAULT], help="encoders or checkpoints (default: the packaged)"
    )
    parser.add_argument("--data", default="photos", help="labelled images with splits train and test (default: photos)")
    parser.add_argument("--size", type=int, help="side of the input in pixels (default: the encoder's)")
    parser.add_argument("--images", type=int, default=256, help="images of each split (default: 256)")
    parser.add_argument("--seconds", type=float, default=10, help="about how long to time each encoder (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    train, test = (open_source(options.data, split=split) for split in ("train", "test"))
    settings = {"data": options.data, "images": options.images, "size": options.size or "the encoder's"}
    print_heading(settings)
    results = []
    for name in options.encoders:
        encoder = load_encoder(name)
        if options.size:
            resize = Preprocess(size=options.size).resize
            encoder = Encoder(encoder.backbone, dataclasses.replace(encoder.info, size=options.size, resize=resize))
        rows = measure(encoder, train, test, options.images, options.seconds)
        print_rows(rows)
        results += rows
    if options.json:
        write_report(options.json, results, settings=settings, seeds={"images": SEED})


def measure(encoder: Encoder, train: Source, test: Source, count: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each precision of an encoder."""
    known, known_labels = draw(train, encoder.preprocess, count)
    unseen, labels = draw(test, encoder.preprocess, count)
    fp32 = to_onnx(encoder)
    models = {
        "fp32": fp32,
        "fp16": to_fp16(fp32),
        "int8": to_int8(fp32, encoder.info.backbone, known),
    }
    times = milliseconds_an_image(list(models.values()), unseen, seconds=seconds)
    rows = []
    reference = features_in_mixed_batches(GraphRunner(fp32), unseen)
    for (precision, model), milliseconds in zip(models.items(), times, strict=True):
        runner = GraphRunner(model)
        features = features_in_mixed_batches(runner, unseen)
        bank = torch.from_numpy(runner.run_in_batches(known, repeat(8))["features"])
        rows.append(
            {
                "encoder": encoder.info.name or encoder.info.backbone,
                "backbone": encoder.info.backbone,
                "size": encoder.info.size,
                "precision": precision,
                "milliseconds": milliseconds,
                "gain": times[0] / milliseconds,
                "megabytes": model.ByteSize() / 1e6,
                "layers_in_int8": layers_in_int8(model),
                **measure_agreement(features, reference).as_dict(),
                "worst_cosine": float(F.cosine_similarity(features, reference).min()),
                "neighbor_among_three": share_found(features, reference),
                "knn": knn_accuracy(bank, known_labels, features, labels, k=20) if labels is not None else None,
            }
        )
    return rows


def draw(source: Source, preprocess: Preprocess, count: int) -> tuple[Pixels, Any]:
    """Evaluation-style input of `count` images by chance, and their labels if all have one."""
    chosen = np.random.default_rng(SEED).permutation(len(source))[:count]
    images = (source.read(int(index)) for index in chosen)
    inputs = [preprocess(decode(image) if isinstance(image, bytes) else image) for image in images]
    labels = [source.label(int(index)) for index in chosen]
    return np.stack(inputs), None if None in labels else torch.tensor(labels)


def share_found(features: Tensor, reference: Tensor) -> float:
    """How often the image that the reference has nearest is among the nearest three."""
    rows = range(len(features))
    found, wanted = (nearest(values, values, NEIGHBORS + 1)[1].tolist() for values in (features, reference))
    others = [[other for other in found[row] if other != row][:NEIGHBORS] for row in rows]
    first = [next(other for other in wanted[row] if other != row) for row in rows]
    return float(np.mean([first[row] in others[row] for row in rows]))


def layers_in_int8(model: ModelProto) -> int:
    """How many layers' weights are kept in int8."""
    return sum(weight.data_type == TensorProto.INT8 and len(weight.dims) > 1 for weight in model.graph.initializer)


def print_heading(settings: dict[str, Any]) -> None:
    """The machine, the settings, and what the columns are."""
    machine = machine_report()
    print(f"{machine['processor']}; one thread")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(
        f"\n{'encoder':<24}{'px':>4}  {'':<5}{'ms':>8}{'gain':>6}{'MB':>7}{'int8':>6}"
        f"{'cosine':>9}{'worst':>8}{'centred':>9}{'nearest':>9}{'in three':>9}{'k-NN':>7}"
    )


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each precision."""
    for row in rows:
        knn = "" if row["knn"] is None else f"{row['knn']:.3f}"
        print(
            f"{row['encoder']:<24.24}{row['size']:>4}  {row['precision']:<5}{row['milliseconds']:>8.2f}"
            f"{row['gain']:>6.2f}{row['megabytes']:>7.1f}{row['layers_in_int8'] or '':>6}{row['cosine']:>9.5f}"
            f"{row['worst_cosine']:>8.4f}{row['centered_cosine']:>9.4f}{row['neighbors']:>9.3f}"
            f"{row['neighbor_among_three']:>9.3f}{knn:>7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
