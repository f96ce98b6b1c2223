"""The paper's comparison at a small scale: each method's baseline against its recipe, paired by seed."""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import write_report
from reproduce_plan import ARMS, CONTESTS, Contest, Training, step_ratio, trainings

from lowssl_core.checkpoint import load_checkpoint
from lowssl_core.command_line import run_for_user
from lowssl_core.encoder import load_encoder, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import check_same_classes
from lowssl_core.evaluation.timm_models import untrained
from lowssl_core.interruption import Interruption
from lowssl_core.journal import read_metrics
from lowssl_core.run import CHECKPOINT
from lowssl_core.sources import open_source

FEATURES = (("k-NN", "knn", "k = 20"), ("linear", "linear", "top-1"))
LABELS = tuple((f"{percent} % labels", "semi", f"{percent} % top-1") for percent in (1, 10))
# A part's columns: title, task of `lowssl evaluate`, figure in its JSON.
MEASURES = {"methods": FEATURES, "backbones": FEATURES, "semi": LABELS}
PARTS = (*MEASURES, "yardsticks")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="What was stopped is taken up where it was; what is finished is not done again. One thread a process, "
        "unless OMP_NUM_THREADS says otherwise.",
    )
    parser.add_argument("--data", type=Path, help="folder or zip with the splits train and test, of class folders")
    parser.add_argument(
        "--scale", choices=CONTESTS, default="small", help="small: hours on a CPU core; cifar: an accelerator, days"
    )
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=["methods", "yardsticks"], help="default: methods yardsticks"
    )
    parser.add_argument("--epochs", type=int, help="of baseline and recipe, instead of the plan's")
    parser.add_argument("--seeds", type=int, help="of each comparison, instead of the plan's")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="pre-train nothing: judge what is finished and print")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, figures and this machine there")
    arguments = parser.parse_args(argv)
    return run_for_user("reproduce", lambda: reproduce(arguments))


def reproduce(arguments: argparse.Namespace) -> int:
    """Train and judge, a comparison at a time, and print the table each time it grows."""
    if arguments.data is None:
        print("reproduce: skipped, --data was not given")
        return 0
    # Refused here, and not after hours.
    check_same_classes(open_source(f"{arguments.data}::train"), open_source(f"{arguments.data}::test"))
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    results: dict[str, Any] = {}
    for part in arguments.part:
        if part == "yardsticks":
            contest = planned(arguments, "methods")[0]
            results[part] = yardsticks(contest, arguments.data, arguments.out)
            print(yardsticks_table(results[part]), flush=True)
            save(arguments, results)
            continue
        contests = planned(arguments, part)
        for group in trainings(contests):
            for training in group:
                if not arguments.table:
                    train(training, arguments.data, arguments.out)
            for training in group:
                if training.is_finished(arguments.out):
                    judge(training, {task for _, task, _ in MEASURES[part]}, arguments.data, arguments.out)
            results[part] = [account(contest, part, arguments.out) for contest in contests]
            if not arguments.table:
                print(table(results[part], part), flush=True)
            save(arguments, results)
        if arguments.table:
            print(table(results[part], part), flush=True)
    return 0


def planned(arguments: argparse.Namespace, part: str) -> list[Contest]:
    changes = {name: getattr(arguments, name) for name in ("epochs", "seeds") if getattr(arguments, name) is not None}
    for name, value in changes.items():
        if value < 1:
            raise UserError(f"--{name} {value}: wanted a whole number from 1")
    return [dataclasses.replace(contest, **changes) for contest in CONTESTS[arguments.scale][part]]


def train(training: Training, data: Path, out: Path) -> None:
    """Run or resume one training, unless it is finished."""
    folder = training.folder(out)
    if training.is_finished(out):
        print(f"{folder.name}: finished already", flush=True)
        return
    print(f"\n{folder.name}", flush=True)
    command = ["lowssl_core.pretrain", training.contest.recipe, "--resume", "--out", str(folder)]
    command += ["--data", f"{data}::train", "--eval-data", f"{data}::test"]
    call(*command, *(f"--set={change}" for change in training.changes(training.epochs(out))))


def judge(training: Training, tasks: set[str], data: Path, out: Path) -> None:
    """Judge a finished run in each of the tasks, once."""
    folder = training.folder(out)
    kept = folder / "features"
    for task in sorted(tasks):
        if task != "semi":
            options = ["--branch", "student", "--branch", "teacher", "--cache", str(kept)]
            options += ["--k", "20"] if task == "knn" else []
        elif training.arm in ("baseline", "recipe"):
            options = ["--branch", "student", "--seed", str(training.seed), "--out", str(folder / "semi")]
        else:
            continue
        evaluate(task, folder / CHECKPOINT, data, folder / f"{task}.json", *options)
    shutil.rmtree(kept, ignore_errors=True)


def evaluate(task: str, model: Path, data: Path, result: Path, *options: str) -> None:
    """Call `lowssl evaluate`, unless its result is there."""
    if not result.exists():
        print(f"\n{task} of {model.parent.name}", flush=True)
        where = ["--data", f"{data}::train", "--eval-data", f"{data}::test", "--json", str(result)]
        call("lowssl_core.command_line", "evaluate", task, str(model), *where, *options)


def call(*arguments: str) -> None:
    """Run a module of LowSSL as a process; a signal to stop is handed on once, and the process ends in its order.

    Raises:
        UserError: it failed.
        StoppedError: told to stop.
    """
    # A session of its own: Ctrl-C would reach it twice, from the terminal and from here.
    process = subprocess.Popen([sys.executable, "-m", *arguments], start_new_session=True)
    told = False
    try:
        with Interruption() as asked:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    if asked.signal_name and not told:
                        process.terminate()
                        told = True
            asked.check()
    finally:
        process.kill()  # nothing, where it has ended
    if process.returncode:
        raise UserError(f"{' '.join(arguments[:3])} ended with status {process.returncode}; what it said is above")


def account(contest: Contest, part: str, out: Path) -> dict[str, Any]:
    """What there is of a contest: every finished run's figures, and the paired comparisons."""
    runs = {}
    for arm in ARMS:
        for seed in range(contest.seeds):
            training = Training(contest=contest, arm=arm, seed=seed)
            if training.is_finished(out):
                runs[arm, seed] = run_account(training, part, out)
    ratio = step_ratio(contest, out) if {("baseline", 0), ("recipe", 0)} <= runs.keys() else None
    rows = [row for arm in ARMS[1:] if (row := comparison(runs, arm, part, ratio))]
    return {
        "name": contest.name,
        "settings": dataclasses.asdict(contest),
        "step_ratio": ratio,
        "comparisons": rows,
        "runs": list(runs.values()),
    }


def run_account(training: Training, part: str, out: Path) -> dict[str, Any]:
    folder = training.folder(out)
    end = read_metrics(folder, "end")[-1]
    tasks = {task: folder / f"{task}.json" for _, task, _ in MEASURES[part]}
    return {
        "arm": training.arm,
        "seed": training.seed,
        "epochs": round(end["epoch"]),
        "images": end["images"],
        "seconds": end["seconds"],
        "recipe": load_checkpoint(folder / CHECKPOINT).recipe.hash(),
        "judged": {task: json.loads(path.read_text())["rows"] for task, path in tasks.items() if path.exists()},
    }


def comparison(
    runs: Mapping[tuple[str, int], Mapping[str, Any]], arm: str, part: str, ratio: float | None
) -> dict[str, Any]:
    """Baseline against an arm over the seeds that have both judged; empty without any."""
    tasks = {task for _, task, _ in MEASURES[part]}
    judged = {key for key, run in runs.items() if tasks <= run["judged"].keys()}
    seeds = sorted(seed for each, seed in judged if each == arm and ("baseline", seed) in judged)
    if not seeds or ratio is None:
        return {}
    epochs = [runs[each, seeds[0]]["epochs"] for each in ("baseline", arm)]
    row: dict[str, Any] = {"arm": arm, "seeds": seeds, "epochs": epochs, "time": ratio * epochs[1] / epochs[0]}
    for title, task, figure in MEASURES[part]:
        pairs = [[student(runs[each, seed]["judged"][task], figure) for each in ("baseline", arm)] for seed in seeds]
        gains = [ours - theirs for theirs, ours in pairs]
        columns = {"baseline": [pair[0] for pair in pairs], "recipe": [pair[1] for pair in pairs], "gain": gains}
        row[title] = {name: spread(values) for name, values in columns.items()}
    return row


def student(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    """The published figures are the student's."""
    return float(next(row["values"][figure] for row in rows if row["subject"] == "student"))


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and the standard deviation over seeds where there are several."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def table(accounts: Sequence[Mapping[str, Any]], part: str) -> str:
    """Baseline -> recipe in percent of the test images, as Markdown."""
    titles = [title for title, _, _ in MEASURES[part]]
    head = ["method, backbone", "epochs", "recipe's time", "seeds", *(t for each in titles for t in (each, "gain"))]
    lines = [f"\n| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for contest in accounts:
        for row in contest["comparisons"]:
            cells = [contest["name"], "{} -> {}".format(*row["epochs"]), f"x {row['time']:.2f}", str(len(row["seeds"]))]
            for title in titles:
                columns = row[title]
                cells += [f"{percent(columns['baseline'])} -> {percent(columns['recipe'])}"]
                cells += [f"**{percent(columns['gain'], sign='+')}**"]
            lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return f"\n{part}: no pair is finished and judged yet"
    lines += ["", "Baseline -> recipe, of the student, in % of the test images; gains in points, of pairs of one seed;"]
    return "\n".join([*lines, "± is the standard deviation over seeds; time is epochs times the step's time."])


def percent(value: Mapping[str, float | None], sign: str = "") -> str:
    assert value["mean"] is not None
    deviation = "" if value["sd"] is None else f" ± {100 * value['sd']:.1f}"
    return f"{100 * value['mean']:{sign}.1f}{deviation}"


def yardsticks(contest: Contest, data: Path, out: Path) -> dict[str, dict[str, float]]:
    """Raw pixels, the network untrained, and the same one trained with all labels in as many epochs.

    Raises:
        UserError: the contest's first run is not there.
    """
    first = Training(contest=contest, arm="recipe", seed=0)
    model = first.folder(out) / CHECKPOINT
    if not first.is_finished(out):
        raise UserError(f"--part yardsticks takes its sizes from {model}, which is not there yet: --part methods first")
    figures: dict[str, dict[str, float]] = {}
    for title, task, figure in FEATURES:
        path, options = out / f"yardsticks-{task}.json", ["--k", "20"] if task == "knn" else []
        evaluate(task, model, data, path, "--branch", "student", "--yardsticks", *options)
        for row in json.loads(path.read_text())["rows"]:
            if row["subject"] != "student":
                figures.setdefault(row["subject"], {})[title] = row["values"][figure]
    start, path = out / "untrained.safetensors", out / "yardsticks-labels.json"
    encoder = untrained(contest.backbone, like=load_encoder(model).info)
    save_encoder(start, encoder.backbone, encoder.info)
    # The semi-supervised protocol with all labels; its batch of 1024 would leave a short run too few steps.
    changes = (f"epochs={contest.epochs}", "batch_size=128", "base_lr=0.2")
    options = [part for change in changes for part in ("--set", change)]
    evaluate(
        "semi", start, data, path, "--branch", "student", "--percent", "100", "--out", str(out / "labels"), *options
    )
    rows = json.loads(path.read_text())["rows"]
    return figures | {"trained with labels": {"linear": rows[0]["values"]["100 % top-1"]}}


def yardsticks_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["\n| yardstick | k-NN | linear |", "|---|---|---|"]
    for name, row in figures.items():
        cells = [f"{100 * row[title]:.1f}" if title in row else "" for title, _, _ in FEATURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save(arguments: argparse.Namespace, results: Mapping[str, Any]) -> None:
    if arguments.json:
        names = ("scale", "part", "epochs", "seeds")
        settings = {name: getattr(arguments, name) for name in names} | {"data": arguments.data.name}
        write_report(arguments.json, results, settings=settings, seeds={"first": 0})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
