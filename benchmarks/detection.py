"""Average precision after a short fine-tuning, from the encoder that comes with the package against a random start."""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import write_report

from lowssl_core.command_line import main as lowssl
from lowssl_core.detection.recipe import load_detection_recipe
from lowssl_core.encoder import load_encoder

RECIPE = "tiny-1x"
NAMES = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Start:
    """What a detector starts from: its name in the table, and what the command calls it."""

    name: str
    model: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="the folder that cutouts.py wrote")
    parser.add_argument("--model", default="default", help="what is compared with a random start (default: default)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each (default 0 1 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"change the recipe {RECIPE}")
    parser.add_argument("--out", type=Path, default=Path("runs/detection"), help="folder of the runs; resumed there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    starts = (
        Start("pre-trained", arguments.model),
        Start("random", f"untrained:{load_encoder(arguments.model).info.backbone}"),
    )
    results: dict[str, list[dict[str, Any]]] = {start.name: [] for start in starts}
    # Both starts of a seed follow each other: an early end leaves pairs.
    for seed in arguments.seeds:
        for start in starts:
            out = arguments.out / f"{start.name}-{seed}"
            status = fine_tune(start, arguments.data, out, [*arguments.set, f"seed={seed}"])
            if status:
                return status
            results[start.name].append(json.loads((out / "figures.json").read_text()))
    print(table(results))
    if arguments.json:
        recipe = load_detection_recipe(RECIPE, arguments.set).as_dict()
        seeds = {f"run {number}": seed for number, seed in enumerate(arguments.seeds)}
        write_report(arguments.json, results, settings={"recipe": recipe, "model": arguments.model}, seeds=seeds)
    return 0


def fine_tune(start: Start, data: Path, out: Path, changes: Sequence[str]) -> int:
    """Run or resume one fine-tuning, or leave a finished one as it is; returns the command's exit status."""
    if (out / "figures.json").exists():
        return 0
    command = ["evaluate", "detect", start.model, "--recipe", RECIPE, "--out", str(out), "--resume"]
    command += ["--json", str(out / "figures.json")]
    for split in ("train", "val"):
        command += [f"--{split}", str(data / f"{split}.json"), f"--{split}-images", str(data / split)]
    command += ["--workers", "0", *(f"--set={change}" for change in changes)]
    return lowssl(command)


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: means over seeds, and the single values of AP."""
    columns = [f"{kind} {name}" for kind in ("box", "mask") for name in NAMES]
    lines = [f"| start | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, runs in results.items():
        cells = []
        for row in range(2):
            for figure in NAMES:
                values = [run["rows"][row]["values"][figure] for run in runs]
                single = f" ({', '.join(f'{value:.3f}' for value in values)})" if figure == "AP" else ""
                cells.append(f"{statistics.mean(values):.3f}{single}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
