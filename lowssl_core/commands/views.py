"""`lowssl views`: what a recipe's views are on one's images, in numbers and as a picture."""

import argparse
from pathlib import Path

from lowssl_core.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a TOML file")
    parser.add_argument("--data", required=True, help="a folder or zip of images, tar shards, or cifar10 or photos")
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), metavar="FILE", help="the figure, a PNG (default views.png)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. views.local_size=96"
    )


def _run(arguments: argparse.Namespace) -> int:
    from lowssl_core.errors import UserError
    from lowssl_core.preview import preview, views_table
    from lowssl_core.recipe import load_recipe
    from lowssl_core.sources import open_source

    if arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder; give the file to write")
    recipe = load_recipe(arguments.recipe, arguments.set)
    source = open_source(arguments.data)
    measured = preview(arguments.out, recipe, source)
    print(source.description)
    print(views_table(recipe.views, measured))
    print(f"wrote {arguments.out}")
    return 0


command = Command(
    name="views",
    help="measure and draw a recipe's views on one's images, and the local size that matches",
    add_arguments=_add_arguments,
    run=_run,
)
