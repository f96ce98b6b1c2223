"""`lowssl-pretrain`: a recipe, a folder of images and an output folder in, a run that can be stopped and resumed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lowssl_core.compute import choose_device, default_workers, device_of_rank
from lowssl_core.distributed import process_group
from lowssl_core.errors import UserError
from lowssl_core.recipe import load_recipe, recipe_names
from lowssl_core.run import Run, RunOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (stopped by the numbers), 2 (wrong input), 130 or 143 (signal)."""
    arguments = _parser().parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        device = choose_device(device_of_rank(arguments.device))
        with process_group(device) as ranks:
            options = RunOptions(
                data=arguments.data,
                eval_data=arguments.eval_data,
                out=arguments.out,
                resume=arguments.resume,
                device=device,
                views=arguments.views,
                workers=arguments.workers,
            )
            return Run(recipe, options, ranks).execute()
    except UserError as error:
        print(f"lowssl-pretrain: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowssl-pretrain",
        description="Pre-train a small vision backbone on unlabelled images, without a teacher network.",
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a TOML file")
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        help="a folder or zip of images, tar shards, cifar10 or photos; ::SPLIT chooses a part; may be repeated",
    )
    parser.add_argument(
        "--eval-data", help="images held out, for the quality measured along the way (default: some of --data)"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the run: checkpoint, encoder, metrics")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. optim.base_lr=0.1"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if it has one")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--views", choices=("auto", "cpu", "device"), default="auto", help="where views are made (auto: measured)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that load images")
    return parser


if __name__ == "__main__":
    sys.exit(main())
