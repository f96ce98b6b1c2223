"""`lowssl simulate`: a federation of simulated devices in one process, with the devices' and the server's own code."""

import argparse
import os
from pathlib import Path

from lowssl_core.command_line import Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a TOML file")
    parser.add_argument(
        "--data",
        required=True,
        help="images in class folders (or a zip, tar shards, cifar10), given out to the devices; PATH::SPLIT chooses a "
        "part. Labels divide and judge; no device sees them",
    )
    parser.add_argument("--eval-data", help="images to judge on (default: the test or validation split of --data)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of everything; resumed from")
    parser.add_argument("--devices", type=int, default=10, metavar="N", help="how many (default 10)")
    parser.add_argument(
        "--partition",
        default="dirichlet:0.1",
        help="which images each device has: iid, dirichlet:ALPHA (default, .1) or classes:K",
    )
    parser.add_argument("--images", type=int, metavar="N", help="of each device (default: all there are)")
    parser.add_argument(
        "--stream",
        type=int,
        default=1,
        metavar="K",
        help="parts, of other classes each, in which a device's images come (default 1)",
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="R", help="how many (default 20)")
    parser.add_argument(
        "--federation",
        default="fedavg",
        metavar="NAME",
        help="fedavg (default), fedema, l-dawa, or a TOML file: rounds, screening, aggregator, learner",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        choices=("alone", "pooled"),
        help="run as well: each device alone, all images on one device, at the same compute",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe, e.g. optim.base_lr=.01, or federation.learner.budget.steps=10",
    )
    parser.add_argument(
        "--judged", type=int, default=1000, metavar="N", help="held-out images to judge on at most (default 1000)"
    )
    parser.add_argument(
        "--device", default="auto", help="where models are judged: auto (default), cpu, cuda ...; devices train on CPU"
    )


def _run(arguments: argparse.Namespace) -> int:
    # As in `lowssl demo`: read by OpenMP when torch is imported, so before the next lines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from server.simulation.experiment import SimulationOptions, simulate

    return simulate(
        SimulationOptions(
            recipe=arguments.recipe,
            overrides=arguments.set,
            federation=arguments.federation,
            data=arguments.data,
            eval_data=arguments.eval_data,
            devices=arguments.devices,
            partition=arguments.partition,
            images=arguments.images,
            stream=arguments.stream,
            rounds=arguments.rounds,
            baselines=arguments.baselines,
            judged=arguments.judged,
            out=arguments.out,
            device=arguments.device,
        )
    )


command = Command(
    name="simulate",
    help="a federation of simulated devices on this machine, beside devices alone and pooled training; resumed",
    add_arguments=_add_arguments,
    run=_run,
)
