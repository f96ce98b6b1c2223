"""`lowssl diagnose`: short trainings over a sweep of crop scale, pixel scale or alpha, and what they come to."""

import argparse
import os
from pathlib import Path

from lowssl_core.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        metavar="KIND",
        choices=("crop-scale", "pixel-scale", "alpha"),
        help="crop-scale (pixel scales kept equal), pixel-scale (local sizes), or alpha (weight of global pairs)",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a TOML file")
    parser.add_argument(
        "--data",
        required=True,
        help="images to train on: a folder or zip, tar shards, cifar10 or photos; PATH::SPLIT chooses a part",
    )
    parser.add_argument(
        "--eval-data", help="images to judge on (default: the test or validation split of --data, or --data itself)"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the figure and of the trainings, kept there"
    )
    parser.add_argument(
        "--values", type=float, nargs="+", metavar="V", help="s0, local sizes in pixels, or alphas (default: six or so)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each value (default 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. epochs=10"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers (default DIR/KIND.json)")


def _run(arguments: argparse.Namespace) -> int:
    # As in `lowssl demo`: read by OpenMP when torch is imported, so before the next lines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lowssl_core.diagnosis.experiment import run_diagnosis
    from lowssl_core.diagnosis.plan import DiagnosisOptions
    from lowssl_core.errors import UserError

    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json} is a folder; give the file to write")
    return run_diagnosis(
        DiagnosisOptions(
            kind=arguments.kind,
            recipe=arguments.recipe,
            overrides=arguments.set,
            data=arguments.data,
            eval_data=arguments.eval_data,
            out=arguments.out,
            json=arguments.json or arguments.out / f"{arguments.kind}.json",
            values=arguments.values,
            seeds=arguments.seeds,
            device=arguments.device,
        )
    )


command = Command(
    name="diagnose",
    help="the paper's diagnosis: quality against crop scale, pixel scale or alpha, by short trainings that are resumed",
    add_arguments=_add_arguments,
    run=_run,
)
