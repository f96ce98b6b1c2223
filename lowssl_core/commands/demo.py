"""`lowssl demo`: a pre-training from start to finish in a few minutes, without any download."""

import argparse
import os
from pathlib import Path

from lowssl_core.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for what is made (default demo)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. epochs=2"
    )


def _run(arguments: argparse.Namespace) -> int:
    # Threads that spin while they wait make training ten times slower on cores that other programs use as well. OpenMP
    # reads this when torch is imported, so before the next line.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lowssl_core.demo import run_demo

    return run_demo(arguments.out, arguments.set)


command = Command(
    name="demo",
    help="pre-train a tiny backbone on photographs and judge it, in about eight minutes; an interrupted one goes on",
    add_arguments=_add_arguments,
    run=_run,
)
