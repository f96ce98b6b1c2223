"""Federated continual learning: how replies are averaged and blended, what is remembered, beside yardsticks."""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

# Ten devices with a world of their own each, which changes three times: 64 new images a round, a memory that holds the
# last 280, and steps enough for a model that learns. About five minutes an arm on one core.
DEVICES, PARTITION, IMAGES, PARTS, ROUNDS, JUDGED = 10, "dirichlet:0.1", 1024, 4, 16, 1000
RECIPE = "tiny-moco-matched"
SHARED = (
    "optim.warmup_steps=10",
    "method.queue_length=256",  # less than a device's images, or an image meets itself as a negative
    "federation.learner.budget.steps=10",
    "federation.learner.memory.max_bytes=1000000",
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn.

    Attributes:
        title: in the table.
        federation: by name.
        changes: to the shared settings.
        seeds: how many.
        has_baselines: whether the devices alone, and all images pooled, are run beside it.
    """

    title: str
    federation: str = "fedavg"
    changes: Sequence[str] = ()
    seeds: int = 2
    has_baselines: bool = False


# The first is what the others are compared with.
ARMS: Mapping[str, Arm] = {
    "fedavg": Arm(title="FedAvg (MinRed, alignment)", seeds=3, has_baselines=True),
    "fedema": Arm(title="FedEMA, tau .7", federation="fedema", seeds=3),
    # At tau .7 and a learning rate that stays, mu goes to 1: see client/blending.py.
    "fedema-gentle": Arm(title="FedEMA, tau .2", federation="fedema", changes=("federation.learner.tau=0.2",)),
    "l-dawa": Arm(title="L-DAWA", federation="l-dawa", seeds=3),
    "fedavgm": Arm(title="FedAvgM, momentum .9", changes=("federation.aggregator.momentum=0.9",)),
    "fifo": Arm(title="memory FIFO", changes=("federation.learner.memory.policy=fifo",)),
    # Every round brings as many new images as a batch holds: nothing is replayed.
    "no-memory": Arm(title="no memory", changes=("federation.learner.budget.new_share=1.0",)),
    "no-alignment": Arm(title="no alignment", changes=("federation.learner.continual.alignment=0.0",)),
}
# The reference's other models, as columns of the same table.
BASELINES = {"alone": "devices alone", "pooled": "pooled"}
MEASURES = {
    "accuracy": "k-NN",
    "own_classes": "own classes",
    "average_accuracy": "ACC",
    "forgetting": "forgetting",
    "backward_transfer": "BWT",
    "forward_transfer": "FWT",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="What was stopped is taken up where it was; what is finished is not done again. One thread, unless "
        "OMP_NUM_THREADS says otherwise. About two hours and a half on one core.",
    )
    parser.add_argument("--data", type=Path, help="folder or zip with the splits train and test, of class folders")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, help="of each arm, instead of the plan's")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
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
    if (folder / RESULTS).exists():
        return
    print(f"\n{folder.name}", flush=True)
    status = simulate(
        SimulationOptions(
            recipe=RECIPE,
            overrides=[*SHARED, *arm.changes, f"seed={seed}"],
            federation=arm.federation,
            data=f"{arguments.data}::train",
            eval_data=f"{arguments.data}::test",
            devices=DEVICES,
            partition=PARTITION,
            images=IMAGES,
            stream=PARTS,
            rounds=arguments.rounds,
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
    print(f"\n{table(rows)}", flush=True)
    if arguments.json:
        settings = {
            "recipe": RECIPE,
            "overrides": SHARED,
            "arms": {name: {"federation": ARMS[name].federation, "changes": ARMS[name].changes} for name in planned},
            "devices": DEVICES,
            "partition": PARTITION,
            "images": IMAGES,
            "parts": PARTS,
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
    alone = figures.get("alone", {})
    gains = [each[kind]["accuracy"] - alone[seed]["own"]["accuracy"] for seed, each in runs.items() if seed in alone]
    row["over_alone"] = spread(gains) if gains and name != "alone" else None
    row |= {key: statistics.mean(each[key] for each in runs.values()) for key in ("bytes_up", "bytes_down", "views")}
    return row


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
