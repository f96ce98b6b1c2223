"""The encoder that comes with the package: trained, judged on held-out photographs, and written in fp16."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from machine import write_report
from torch import Tensor

from lowssl_core.backbones import build_backbone
from lowssl_core.encoder import Encoder, load_encoder, save_encoder
from lowssl_core.images import Pixels
from lowssl_core.journal import read_metrics
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.pretrain import main as pretrain
from lowssl_core.quality import raw_pixels, retrieval_copies, retrieval_recall
from lowssl_core.recipe import load_recipe
from lowssl_core.sources import Source, open_source
from lowssl_core.sources.memory import load_images
from lowssl_core.spectra import rankme

RECIPE = "default-encoder"
DATA = "clothing160 (train split, 3,068 photographs, CC0-1.0) and photos (1,877 train tiles of ten free photographs)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clothing", required=True, type=Path, help="clothing160: zip or folder with train and test")
    parser.add_argument("--out", type=Path, default=Path("runs/default-encoder"), help="the run's folder; resumed")
    parser.add_argument("--weights", type=Path, help="where to write the encoder in fp16 (lowssl_core/weights/...)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    data = ["--data", str(arguments.clothing), "--data", "photos", "--eval-data", f"{arguments.clothing}::test"]
    status = pretrain([RECIPE, *data, "--out", str(arguments.out), "--resume"])
    if status:
        return status
    trained = load_encoder(arguments.out / "checkpoint.safetensors")
    if arguments.weights:
        info = dataclasses.replace(trained.info, name="LowSSL default encoder", data=DATA, licence="Apache-2.0")
        info = save_encoder(arguments.weights, trained.backbone, info, half=True)
        print(f"{arguments.weights}: {arguments.weights.stat().st_size:,} bytes, weights {info.weights_hash}")
        trained = load_encoder(arguments.weights)  # what is judged is what ships
    torch.manual_seed(0)
    untrained = Encoder(build_backbone(trained.info.backbone)[0], trained.info)
    rows = []
    shrink_to = load_recipe(RECIPE).data.shrink_to
    for name, path in (("clothing160", str(arguments.clothing)), ("photos", "photos")):
        bank, queries = open_source(path, split="train"), open_source(path, split="test")
        for label, features in (("raw pixels", raw_pixels), ("untrained", untrained.embed), ("trained", trained.embed)):
            rows.append({"data": name, "features": label} | judge(bank, queries, features, shrink_to))
    print("| data | features | retrieval | k-NN | RankMe |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['data']} | {row['features']} | {row['retrieval']:.3f} | {row['knn']:.3f} | {row['rankme']:.1f} |"
        )
    if arguments.json:
        results = {"quality": rows, "curve": read_metrics(arguments.out, "quality")}
        write_report(arguments.json, results, settings={"recipe": load_recipe(RECIPE).as_dict()}, seeds={"run": 0})
    return 0


def judge(
    bank: Source, queries: Source, features: Callable[[Sequence[Pixels]], Tensor], shrink_to: int | None
) -> dict[str, float]:
    """Retrieval, k-NN with all of `bank`, and RankMe, of all of `queries`."""
    known, known_labels, _ = load_images(bank, shrink_to=shrink_to)
    images, labels, _ = load_images(queries, shrink_to=shrink_to)
    found = features(images)
    return {
        "retrieval": retrieval_recall(found, features(list(retrieval_copies(images, seed=0)))),
        "knn": knn_accuracy(features(known), torch.tensor(known_labels), found, torch.tensor(labels)),
        "rankme": rankme(found),
    }


if __name__ == "__main__":
    sys.exit(main())
