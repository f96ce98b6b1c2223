"""Federated continual learning: how replies are averaged and blended, what is remembered, beside yardsticks."""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is imported, so before the next lines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from machine import write_report

from lowssl_core.command_line import run_for_user
from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import check_same_classes
from lowssl_core.sources import open_source
from server.simulation.experiment import RESULTS, SimulationOptions, simulate
from server.simulation.outcome import MEASURES

RECIPE, JUDGED = "tiny-moco-matched", 1000
SHARED = (
    "optim.warmup_steps=10",
    "method.queue_length=256",  # less than a device's images, or an image meets itself as a negative
    "federation.learner.memory.max_bytes=1000000",  # about 280 images
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Who learns, and from what.

    Attributes:
        devices: how many.
        partition: of the images among them.
        images: each has.
        parts: in which they come.
        rounds: how many.
        steps: of a device in each.
    """

    devices: int
    partition: str
    images: int
    parts: int
    rounds: int
    steps: int


# Ten devices with a world of their own each, which changes three times: 64 new images a round. About five minutes an
# arm on one core.
FLEET = World(devices=10, partition="dirichlet:0.1", images=1024, parts=4, rounds=16, steps=10)
# One device that meets two classes after the other: nothing but its memory helps it to keep the earlier ones.
CAMERA = World(devices=1, partition="iid", images=5120, parts=5, rounds=20, steps=40)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn.

    Attributes:
        title: in the table.
        federation: by name.
        changes: to the shared settings.
        seeds: how many.
        has_baselines: whether the devices alone, and all images pooled, are run beside it.
        world: who learns, and from what.
    """

    title: str
    federation: str = "fedavg"
    changes: Sequence[str] = ()
    seeds: int = 2
    has_baselines: bool = False
    world: World = FLEET


FIFO = ("federation.learner.memory.policy=fifo",)
# Every round brings as many new images as a batch holds: nothing is replayed.
NO_MEMORY = ("federation.learner.budget.new_share=1.0",)
NO_ALIGNMENT = ("federation.learner.continual.alignment=0.0",)
# The first of a world is what its others are compared with.
ARMS: Mapping[str, Arm] = {
    "fedavg": Arm(title="FedAvg (MinRed, alignment)", seeds=3, has_baselines=True),
    "fedema": Arm(title="FedEMA, tau .7", federation="fedema", seeds=3),
    # At tau .7 and a learning rate that stays, mu goes to 1: see client/blending.py.
    "fedema-gentle": Arm(title="FedEMA, tau .2", federation="fedema", changes=("federation.learner.tau=0.2",)),
    "l-dawa": Arm(title="L-DAWA", federation="l-dawa", seeds=3),
    "fedavgm": Arm(title="FedAvgM, momentum .9", changes=("federation.aggregator.momentum=0.9",)),
    "fifo": Arm(title="memory FIFO", changes=FIFO),
    "no-memory": Arm(title="no memory", changes=NO_MEMORY),
    "no-alignment": Arm(title="no alignment", changes=NO_ALIGNMENT),
    "camera": Arm(title="MinRed, alignment", world=CAMERA),
    "camera-fifo": Arm(title="memory FIFO", changes=FIFO, world=CAMERA),
    "camera-no-memory": Arm(title="no memory", changes=NO_MEMORY, world=CAMERA),
    "camera-no-alignment": Arm(title="no alignment", changes=NO_ALIGNMENT, world=CAMERA),
}
# The reference's other models, as columns of the same table.
BASELINES = {"alone": "devices alone", "pooled": "pooled"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="What was stopped is taken up where it was; what is finished is not done again. One thread, unless "
        "OMP_NUM_THREADS says otherwise. About three hours on one core.",
    )
    parser.add_argument("--data", type=Path, help="folder or zip with the splits train and test, of class folders")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, help="of each arm, instead of the plan's")
    parser.add_argument("--rounds", type=int, help="of each arm, instead of the plan's")
    parser.add_argument("--out", type=Path, default=Path("runs/federated-learning"), help="folder of the simulations")
    parser.add_argument("--table", action="store_true", help="run nothing: print what is finished")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, figures and this machine there")
    arguments = parser.parse_args(argv)
    return run_for_user("federated_learning", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> int:
    """Run arm after arm, the first seed of all before the second of any, and print the table as it grows."""
    if arguments.data is None:
        print("federated_learning: skipped, --data was not given")
        return 0
    for name in ("seeds", "rounds"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: wanted a whole number from 1")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    # Refused here, and not after hours.
    check_same_classes(open_source(f"{arguments.data}::train"), open_source(f"{arguments.data}::test"))
    planned = {name: arguments.seeds or ARMS[name].seeds for name in arguments.arms}
    for seed in range(max(planned.values())):
        for name in arguments.arms:
            if seed < planned[name] and not arguments.table:
                run(name, seed, arguments)
                report(arguments, planned)
    report(arguments, planned)
    return 0


def run(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Run or resume one arm with one seed, unless it is finished."""
    folder, arm = folder_of(arguments, name, seed), ARMS[name]
    world = arm.world
    changes = [*SHARED, f"federation.learner.budget.steps={world.steps}", *arm.changes, f"seed={seed}"]
    if (folder / RESULTS).exists():
        return
    print(f"\n{folder.name}", flush=True)
    status = simulate(
        SimulationOptions(
            recipe=RECIPE,
            overrides=changes,
            federation=arm.federation,
            data=f"{arguments.data}::train",
            eval_data=f"{arguments.data}::test",
            devices=world.devices,
            partition=world.partition,
            images=world.images,
            stream=world.parts,
            rounds=arguments.rounds or world.rounds,
            baselines=("alone", "pooled") if arm.has_baselines else (),
            judged=JUDGED,
            out=folder,
            device="cpu",
        )
    )
    if status:
        sys.exit(status)
    # Half a gigabyte of weights and images that nobody will look at again.
    for course in ("federated", "alone", "pooled"):
        for part in ("devices", "server"):
            shutil.rmtree(folder / course / part, ignore_errors=True)


def folder_of(arguments: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(arguments.out / f"{name}-seed{seed}")


def report(arguments: argparse.Namespace, planned: Mapping[str, int]) -> None:
    """Print what is finished and write it down."""
    figures: dict[str, dict[int, Any]] = {}
    for name, seeds in planned.items():
        for seed in range(seeds):
            path = folder_of(arguments, name, seed) / RESULTS
            if path.exists():
                courses = json.loads(path.read_text())["figures"]
                figures.setdefault(name, {})[seed] = courses["federated"]
                for baseline in BASELINES.keys() & courses.keys():
                    figures.setdefault(baseline, {})[seed] = courses[baseline]
    rows = [
        row for name in (*planned, *BASELINES) for kind in ("shared", "own") if (row := account(figures, name, kind))
    ]
    for world, title in ((FLEET, "ten devices"), (CAMERA, "one device, class after class")):
        print(f"\n{title}\n\n{table([row for row in rows if world_of(row['arm']) == world])}", flush=True)
    if arguments.json:
        settings = {
            "recipe": RECIPE,
            "overrides": SHARED,
            "arms": {name: asdict(ARMS[name]) for name in planned},
            "rounds": arguments.rounds,
            "judged": JUDGED,
            "data": arguments.data.name,
        }
        write_report(arguments.json, {"rows": rows, "figures": figures}, settings=settings, seeds={"first": 0})


def account(figures: Mapping[str, Mapping[int, Any]], name: str, kind: str) -> dict[str, Any] | None:
    """One model of an arm over its seeds, and its k-NN accuracy less that of the devices alone, paired by seed."""
    runs = {seed: each for seed, each in figures.get(name, {}).items() if each[kind] is not None}
    if not runs:
        return None
    title = ARMS[name].title if name in ARMS else BASELINES[name]
    row: dict[str, Any] = {"arm": name, "model": kind, "title": title, "seeds": sorted(runs)}
    row |= {key: spread([each[kind][key] for each in runs.values()]) for key in MEASURES}
    alone = figures.get("alone", {}) if world_of(name) == FLEET else {}
    gains = [each[kind]["accuracy"] - alone[seed]["own"]["accuracy"] for seed, each in runs.items() if seed in alone]
    row["over_alone"] = spread(gains) if gains and name != "alone" else None
    row |= {key: statistics.mean(each[key] for each in runs.values()) for key in ("bytes_up", "bytes_down", "views")}
    return row


def world_of(arm: str) -> World:
    """The world of an arm, or of a baseline."""
    return ARMS[arm].world if arm in ARMS else FLEET


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and the standard deviation over seeds where there are several."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies in percent and differences in points, as Markdown."""
    if not rows:
        return "nothing is finished yet"
    head = ["", "model", "seeds", *MEASURES.values(), "over alone", "MB up", "MB down"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        model = {"pooled": "the one", "alone": "devices' own"}.get(row["arm"])
        cells = [
            row["title"],
            model or {"shared": "global", "own": "devices' own"}[row["model"]],
            str(len(row["seeds"])),
        ]
        signs = dict.fromkeys(("forgetting", "backward_transfer", "forward_transfer"), "+")
        cells += [percent(row[key], signs.get(key, "")) for key in MEASURES]
        cells += ["" if row["over_alone"] is None else percent(row["over_alone"], "+")]
        cells += [f"{row[key] / 1e6:.0f}" for key in ("bytes_up", "bytes_down")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "k-NN in % of held-out images of all classes; own classes, ACC, forgetting, BWT and FWT on the classes",
    ]
    return "\n".join([*lines, "of each device, mean over devices; ± is the standard deviation over seeds."])


def percent(value: Mapping[str, float | None], sign: str = "") -> str:
    assert value["mean"] is not None
    deviation = "" if value["sd"] is None else f" ± {100 * value['sd']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
