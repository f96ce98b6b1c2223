"""The demonstration: pre-train a tiny backbone on photographs in minutes, judge and serve it, and let devices go on."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lowssl_core
from lowssl_core.backbones import build_backbone
from lowssl_core.checkpoint import load_checkpoint
from lowssl_core.demo_federation import federate, read_results, why_not
from lowssl_core.demo_serving import Answer, serve_and_ask
from lowssl_core.encoder import Encoder, EncoderInfo, load_encoder
from lowssl_core.errors import UserError
from lowssl_core.figures import curves_figure, neighbors_figure
from lowssl_core.files import write_atomically
from lowssl_core.journal import read_metrics
from lowssl_core.neighbors import knn_accuracy
from lowssl_core.preprocess import Preprocess
from lowssl_core.pretrain import main as pretrain
from lowssl_core.preview import preview, views_table
from lowssl_core.quality import raw_pixels, retrieval_copies, retrieval_recall
from lowssl_core.recipe import Recipe, load_recipe
from lowssl_core.run import CHECKPOINT, ENCODER
from lowssl_core.sources import Source, open_source
from lowssl_core.sources.memory import load_images

RECIPE = "tiny-moco-matched"
DATA = "photos"
# What a run's folder holds, and what a new run replaces; nothing else in it is touched.
RUN_FILES = (CHECKPOINT, ENCODER, "metrics.jsonl", "nonfinite.json")
# In the demo's folder: that of the server, that of the devices, and the figures, written last.
SERVER, DEVICES, RESULTS = "server", "federation", "results.json"
# The same copies as along the run, so that its curves end at the table's figures.
SEED_OF_COPIES = 0
UNTRAINED, PIXELS, TRAINED, PACKAGED = "random network", "raw pixels", "this run", "default encoder"

Embed = Callable[[Sequence[NDArray[np.uint8]]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well features tell images apart: recall@1 from recoloured crops, and k-NN accuracy; 0 to 1."""

    retrieval: float
    knn: float


def run_demo(out: Path, overrides: Sequence[str] = ()) -> int:
    """Train, judge, draw, serve and federate, all in the folder `out`; returns an exit status.

    A demo in `out` that was interrupted goes on: its run is continued, and all that comes after it done again. A
    finished one, or one of another recipe, is replaced.

    Args:
        out: where everything is written.
        overrides: of the recipe, as `load_recipe` takes them.

    Raises:
        UserError: a wrong override, packages that came without their photographs, or a server that cannot start.
    """
    start = time.monotonic()
    recipe = load_recipe(RECIPE, overrides)
    train, test = open_source(DATA, split="train"), open_source(DATA, split="test")
    print(_announcement(recipe, train, test), flush=True)
    measured = preview(out / "views.png", recipe, train)
    print(f"\n1. Views\n\n{views_table(recipe.views, measured)}\n\n2. Training\n", flush=True)
    run = out / "run"
    arguments = [RECIPE, "--data", f"{DATA}::train", "--eval-data", f"{DATA}::test", "--out", str(run)]
    arguments += [part for override in overrides for part in ("--set", override)]
    if not make_room(out, recipe):
        arguments.append("--resume")
    status = pretrain(arguments)
    if status:
        if status in (130, 143):
            print("interrupted: the same command goes on from here")
        return status
    print("\n3. Quality on the tiles held out\n", flush=True)
    qualities = judge(_embeddings(run, recipe), train, test, recipe.data.shrink_to)
    print(_table(qualities, len(test)), flush=True)
    _draw_curves(out / "curves.png", run, recipe, qualities)
    print("\n4. Served\n", flush=True)
    answer = serve_and_ask(run / ENCODER, out / SERVER, test)
    print(_neighbors_table(answer, test.classes or ()), flush=True)
    neighbors_figure(out / "neighbors.png", answer.images, answer.examples, answer.neighbors, answer.cosines)
    print("\n5. Federated\n", flush=True)
    federated = None
    if reason := why_not():
        print(reason)
    else:
        status = federate(run / CHECKPOINT, out / SERVER, out / DEVICES, out / "federation.png")
        if status:
            if status in (130, 143):
                print("interrupted: the same command does this step anew")
            return status
        federated = read_results(out / DEVICES)
    seconds = time.monotonic() - start
    _write_results(out / RESULTS, run, recipe, qualities, federated, seconds)
    print(f"\n{_summary(out, qualities, federated, seconds)}")
    return 0


def judge(
    embeddings: Mapping[str, Embed], train: Source, test: Source, shrink_to: int | None = None
) -> dict[str, Quality]:
    """Judge each of the `embeddings`, from images to features (N, D), on `test` with `train` as bank of k-NN.

    `shrink_to` is that of training, so that a run's curves, measured along the way, end at the same figures.
    """
    bank, bank_labels, _ = load_images(train, shrink_to=shrink_to)
    queries, query_labels, _ = load_images(test, shrink_to=shrink_to)
    copies = list(retrieval_copies(queries, seed=SEED_OF_COPIES))
    qualities = {}
    for name, embed in embeddings.items():
        features = embed(queries)
        qualities[name] = Quality(
            retrieval=retrieval_recall(features, embed(copies)),
            knn=knn_accuracy(embed(bank), torch.tensor(bank_labels), features, torch.tensor(query_labels)),
        )
    return qualities


def make_room(out: Path, recipe: Recipe) -> bool:
    """Remove a finished demo, or one of another recipe; returns whether there is none now (False: it can go on)."""
    run, results = out / "run", out / RESULTS
    if (run / CHECKPOINT).exists():
        try:
            if load_checkpoint(run / CHECKPOINT).recipe == recipe and not results.exists():
                return False
        except UserError as error:
            print(f"{error}; the run starts anew")
    results.unlink(missing_ok=True)
    for name in RUN_FILES:
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    return True


def _embeddings(run: Path, recipe: Recipe) -> dict[str, Embed]:
    """What is compared, by name."""
    torch.manual_seed(recipe.seed)
    backbone, width = build_backbone(recipe.backbone.name)
    trained = load_encoder(run / ENCODER)
    info = EncoderInfo(
        name=UNTRAINED,
        backbone=recipe.backbone.name,
        width=width,
        **asdict(Preprocess(size=trained.info.size, resize=trained.info.resize)),
    )
    embeddings: dict[str, Embed] = {
        UNTRAINED: Encoder(backbone, info).embed,
        PIXELS: raw_pixels,
        TRAINED: trained.embed,
    }
    try:
        embeddings[PACKAGED] = load_encoder("default").embed
    except UserError as error:
        print(f"{error}\n")
    return embeddings


def _announcement(recipe: Recipe, train: Source, test: Source) -> str:
    return (
        f"This trains a {recipe.backbone.name} from scratch, without labels, with the recipe {RECIPE}:\n"
        f"{len(train)} tiles of the photographs that scikit-image and scikit-learn ship, {recipe.epochs} times each.\n"
        f"Then it judges what was learnt on {len(test)} tiles from other regions of the photographs, and serves it.\n"
        "At last three devices train it on together. No network is used. It takes about eight minutes on two cores."
    )


def _table(qualities: Mapping[str, Quality], images: int) -> str:
    lines = [f"{'':<18}{'retrieval':>10}{'k-NN':>8}"]
    lines += [f"{name:<18}{quality.retrieval:>10.3f}{quality.knn:>8.3f}" for name, quality in qualities.items()]
    lines += [
        "",
        f"retrieval: share of {images} tiles found first among all from a cropped, mirrored, recoloured copy",
        "k-NN: share whose photograph is named by the 20 nearest train tiles",
    ]
    return "\n".join(lines)


def _neighbors_table(answer: Answer, photographs: Sequence[str]) -> str:
    width = max(map(len, photographs)) + 2
    lines = [
        f"{len(answer.images)} tiles went through /embed of a server that has the encoder as {answer.version};",
        "of each photograph one, and what its nearest other tiles are of (cosine):",
        "",
    ]
    for index in answer.examples:
        found = [
            f"{photographs[answer.labels[neighbor]]} {cosine:.2f}"
            for neighbor, cosine in zip(answer.neighbors[index], answer.cosines[index], strict=True)
        ]
        lines.append(f"{photographs[answer.labels[index]]:<{width}}{''.join(f'{one:<{width + 5}}' for one in found)}")
    lines += [
        "",
        f"{100 * answer.agreement:.0f} of 100 tiles have their nearest neighbor in the same photograph "
        f"(by chance: {100 * answer.chance:.0f})",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _draw_curves(path: Path, run: Path, recipe: Recipe, qualities: Mapping[str, Quality]) -> None:
    baselines = {name: asdict(quality) for name, quality in qualities.items() if name != TRAINED}
    title = f"{recipe.method.name} on {recipe.backbone.name}, tiles of photographs, from scratch"
    curves_figure(path, read_metrics(run, "train"), read_metrics(run, "quality"), baselines, title=title)


def _write_results(
    path: Path,
    run: Path,
    recipe: Recipe,
    qualities: Mapping[str, Quality],
    federated: Mapping[str, Any] | None,
    seconds: float,
) -> None:
    results = {
        "recipe": {"name": RECIPE, "hash": recipe.hash(), "seed": recipe.seed},
        "data": DATA,
        "training": read_metrics(run, "end")[-1],
        "quality": {name: asdict(quality) for name, quality in qualities.items()},
        "federation": federated,
        "seconds": round(seconds, 1),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "lowssl": lowssl_core.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_atomically(path, lambda file: file.write(json.dumps(results, indent=2).encode()))


def _summary(out: Path, qualities: Mapping[str, Quality], federated: Mapping[str, Any] | None, seconds: float) -> str:
    found = {name: f"{100 * quality.retrieval:.0f}" for name, quality in qualities.items()}
    files = {
        "views.png": "one tile, its views, and the local size that matches",
        "curves.png": "loss and quality against images seen",
        "neighbors.png": "tiles and their nearest neighbors, by the embeddings that the server gave",
        f"run/{ENCODER}": "the encoder",
        f"run/{CHECKPOINT}": "the whole run",
        RESULTS: "the figures above",
    }
    if federated is not None:
        files["federation.png"] = "what the devices saw, and the global model against devices alone, after each round"
    width = max(len(str(out / name)) for name in files)
    return "\n".join(
        [
            f"In {seconds / 60:.1f} minutes an encoder was trained from nothing; "
            f"it finds {found[TRAINED]} of 100 tiles (untrained: {found[UNTRAINED]}, raw pixels: {found[PIXELS]}).",
            *([] if federated is None else [federated["sentence"]]),
            *(f"  {out / name!s:<{width}}  {what}" for name, what in files.items()),
            f"Serve it: lowssl-server --data-dir {out / SERVER}",
        ]
    )
