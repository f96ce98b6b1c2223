"""Learning curves of the tiny recipes on real images: each method, beside raw pixels and the untrained network."""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from machine import write_report
from matplotlib.figure import Figure

from lowssl_core.journal import read_metrics

mpl.use("Agg")


@dataclass(frozen=True)
class Case:
    """One run: a recipe, one of the two data sets, and what is changed in the recipe."""

    name: str
    recipe: str
    data: str
    changes: Sequence[str]


SEED = 0
SMALL_MOBILENET = "backbone.name=mobilenetv2_035"
CLOTHING, CIFAR = ("epochs=55",), ("epochs=4", "monitor.quality_every_epochs=1", "monitor.checkpoint_every_epochs=1")
CASES = (
    *(Case(f"{m}-clothing", f"tiny-{m}-matched", "clothing", CLOTHING) for m in ("moco", "dino", "swav")),
    *(Case(f"{m}-cifar", f"tiny-{m}-matched", "cifar", CIFAR) for m in ("moco", "dino", "swav")),
    Case("dino-clothing-mbv2", "tiny-dino-matched", "clothing", ("epochs=25", SMALL_MOBILENET)),
    Case(
        "moco-clothing-mbv2",
        "tiny-moco-matched",
        "clothing",
        # At 32 px the last maps of a MobileNetV2 are single pixels.
        (
            "epochs=14",
            SMALL_MOBILENET,
            "views.global_size=64",
            "data.shrink_to=80",
            "monitor.quality_every_epochs=2",
        ),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clothing", type=Path, help="zip or folder with the splits train and test")
    parser.add_argument("--cifar", type=Path, help="the same for CIFAR-10")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tiny"), help="folder of the runs; they are resumed there"
    )
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES], help="some of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    data = {"clothing": arguments.clothing, "cifar": arguments.cifar}
    results = {}
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        if data[case.data] is None:
            print(f"{case.name}: skipped, --{case.data} was not given")
            continue
        if train(case, data[case.data], arguments.out / case.name):
            return 1
        results[case.name] = read_metrics(arguments.out / case.name, "quality")
    if not results:
        return 0
    print(table(results))
    draw(arguments.out / "curves.png", results)
    print(f"curves: {arguments.out / 'curves.png'}")
    if arguments.json:
        write_report(arguments.json, results, settings={"cases": [vars(case) for case in CASES]}, seeds={"run": SEED})
    return 0


def train(case: Case, data: Path, out: Path) -> int:
    """Run or resume one case on one core; returns the command's exit status."""
    command = [sys.executable, "-m", "lowssl_core.pretrain", case.recipe, "--resume", "--out", str(out)]
    command += ["--data", f"{data}::train", "--eval-data", f"{data}::test", f"--set=seed={SEED}"]
    command += [f"--set={change}" for change in case.changes]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: retrieval and k-NN of raw pixels, the untrained and the trained network."""
    lines = [
        "| run | images seen | minutes | retrieval: pixels, untrained, trained (teacher) | k-NN: the same |",
        "|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        first, last = rows[0], rows[-1]
        columns = []
        for figure in ("retrieval", "knn"):
            teacher = f" ({last[f'teacher_{figure}']:.3f})" if f"teacher_{figure}" in last else ""
            columns.append(f"{first[f'pixels_{figure}']:.3f}, {first[figure]:.3f}, **{last[figure]:.3f}**{teacher}")
        lines.append(f"| {name} | {last['images']:,} | {last['seconds'] / 60:.1f} | {columns[0]} | {columns[1]} |")
    return "\n".join(lines)


def draw(path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Retrieval and k-NN against images seen, a column of plots for each data set."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    colors = {"moco": "#0072b2", "dino": "#d55e00", "swav": "#009e73"}
    for column, data in enumerate(("clothing", "cifar")):
        runs = {name: rows for name, rows in results.items() if name.split("-")[1] == data}
        for row, quality in enumerate(("retrieval", "knn")):
            axis = axes[row][column]
            for name, rows in runs.items():
                small = name.endswith("mbv2")
                axis.plot(
                    [each["images"] / 1000 for each in rows],
                    [each[quality] for each in rows],
                    color=colors[name.split("-")[0]],
                    linestyle=":" if small else "-",
                    label=name.split("-")[0] + (", MobileNetV2 x .35" if small else ""),
                )
            if runs:
                level = next(iter(runs.values()))[0][f"pixels_{quality}"]
                axis.axhline(level, color="0.5", linestyle="--", linewidth=1, label="raw pixels")
                axis.legend(frameon=False, fontsize=8)
            axis.set_title(f"{quality}, {data}", loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            if row:
                axis.set_xlabel("thousand images seen")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
