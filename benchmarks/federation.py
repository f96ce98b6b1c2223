"""What a federated round costs beside its training: a real server and real devices here, beside plain Flower."""

import argparse
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fleet import BATCH, GLOBAL_SIZE, LOCAL_SIZE, NEW_IMAGES, QUEUE, STEPS, fleet
from machine import machine_report, write_report
from plain_flower import plain_rounds
from process_watch import ProcessWatch

from lowssl_core.command_line import run_for_user
from lowssl_core.errors import UserError
from lowssl_core.sources import Source, open_source
from server.federation.history import History

BOUND = 10.0
PLAIN_ROUNDS = 5
# Of plain Flower: what travels.
PLAIN = {"number": "one number, without torch", "network": "the network, a tensor at a time, with torch"}
# Of a round, along the device that answered last.
PARTS = {
    "down": "until the device has it",
    "steps": "training",
    "beside": "the device beside it",
    "up": "until it is on the server's disk",
}
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) round (\d+): (begun|answered)", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="A round is timed from when the last one was on the server's disk to when it is. Its overhead is that "
        "less the longest bare training among its devices, the optimizer's steps and the views made for them; taking "
        "in images, writing state and encoding count as overhead. The first round is not counted. Afterwards the same "
        "machine runs rounds of Flower alone, by its own FedAvg, that train nothing. About five minutes; for Linux.",
    )
    parser.add_argument("--data", metavar="PATH", help="images: a folder, a zip or a name, with ::SPLIT")
    parser.add_argument("--devices", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=8, help="default: 8")
    parser.add_argument("--backbone", default="mobilenetv2", help="whose weights travel (default: mobilenetv2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args(argv)
    return run_for_user("federation", lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Run the federation, a line for each round, then the yardsticks, and say what they cost."""
    if arguments.data is None:
        print("federation: skipped, --data was not given")
        return 0
    for name, least in (("devices", 1), ("rounds", 2)):
        if (value := getattr(arguments, name)) < least:
            raise UserError(f"--{name} {value}: wanted a whole number from {least}")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    source = open_source(arguments.data)
    print(f"{machine_report()['processor']}, {len(os.sched_getaffinity(0))} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="lowssl-federation-") as name:
        # Before the yardsticks, for what a person got wrong shows here.
        results = run_federation(Path(name) / "fleet", source, arguments)
        results["plain"] = run_plain(Path(name), arguments)
    results["summary"] = summarize(results["rounds"], results["plain"])
    print(table(results))
    if arguments.json:
        settings = {
            "backbone": arguments.backbone,
            "devices": arguments.devices,
            "rounds": arguments.rounds,
            "plain_rounds": min(PLAIN_ROUNDS, arguments.rounds),
            "data": source.description,
            **{"steps": STEPS, "batch": BATCH, "new_images": NEW_IMAGES, "queue_length": QUEUE},
            **{"global_size": GLOBAL_SIZE, "local_size": LOCAL_SIZE},
        }
        write_report(arguments.json, results, settings=settings, seeds={"weights": 0})
    return 0


def run_federation(folder: Path, source: Source, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds, sizes, memory and load of a federation, as they are written down."""
    folder.mkdir()
    total = arguments.rounds
    print(f"starting a server and {arguments.devices} devices", flush=True)
    with fleet(folder, source, backbone=arguments.backbone, devices=arguments.devices, rounds=total) as running:
        print(f"\n{'round':>5}{'seconds':>9}{'training':>10}{'overhead':>10}{'load':>7}", flush=True)
        loads = []
        with ProcessWatch(running.processes.pids()) as watch:
            running.processes.order(total)
            for number in running.follow(total):
                loads.append(os.getloadavg()[0])
                print_rounds(read_rounds(running.federation, running.device_logs), number, loads[-1])
        manifest = History(running.federation).manifest
        return {
            "rounds": read_rounds(running.federation, running.device_logs),
            "model_bytes": 4 * manifest.size,
            "processes": watch.rows(),
            "totals_mib": watch.totals(),
            "load_average": loads,
        }


def run_plain(folder: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the rounds of Flower alone, for each kind."""
    seconds = {}
    for kind, title in PLAIN.items():
        print(f"\nFlower alone, {title}: ", end="", flush=True)
        seconds[kind] = plain_rounds(
            folder / kind,
            backbone=arguments.backbone if kind == "network" else "",
            devices=arguments.devices,
            rounds=min(PLAIN_ROUNDS, arguments.rounds),
            batch=BATCH,
        )
        print(", ".join(f"{value:.1f}" for value in seconds[kind]), f"s a round (load {os.getloadavg()[0]:.1f})")
    return seconds


def read_rounds(folder: Path, device_logs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """What a federation's records and its devices' logs say of each round from the second on.

    Args:
        folder: of the federation.
        device_logs: what `lowssl-client run` wrote, by the device's id.

    Returns:
        For each round its number, `seconds` (from one record to the next), `recorded_seconds` (what the record says,
        without what lies between two rounds), `training` (the longest of its devices), `overhead`, the `PARTS`
        in seconds, how many devices' replies counted (`accepted`, `asked`), and bytes down and up for each device.
    """
    noted = {device: read_log(path.read_text()) for device, path in device_logs.items()}
    rows: list[dict[str, Any]] = []
    saved = 0.0
    for record in History(folder).records():
        before, saved = saved, (folder / "rounds" / f"{record.version:06}" / "round.json").stat().st_mtime
        if record.version < 2 or not record.accepted:
            continue
        trained = {reply["device"]: reply["metrics"]["seconds"] for reply in record.accepted}
        last = max(trained, key=lambda device: noted[device][record.version][1])
        begun, answered = noted[last][record.version]
        training, seconds = max(trained.values()), saved - before
        rows.append(
            {
                "round": record.version,
                "seconds": seconds,
                "recorded_seconds": record.seconds,
                "training": training,
                "overhead": seconds - training,
                "down": begun - before,
                "steps": trained[last],
                "beside": answered - begun - trained[last],
                "up": saved - answered,
                "asked": len(record.asked),
                "accepted": len(record.accepted),
                "bytes_down": record.bytes_down / len(record.asked),
                "bytes_up": record.bytes_up / len(record.accepted),
            }
        )
    return rows


def read_log(text: str) -> dict[int, tuple[float, float]]:
    """When a device began each round and when it had answered it, in seconds since 1970, from its log."""
    times: dict[int, dict[str, float]] = {}
    for moment, number, event in _LINE.findall(text):
        seconds = datetime.strptime(moment, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        times.setdefault(int(number), {})[event] = seconds
    return {number: (each["begun"], each["answered"]) for number, each in times.items() if len(each) == 2}


def summarize(rounds: Sequence[Mapping[str, Any]], plain: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median, least and most of each figure over the rounds, and the overhead in rounds of plain Flower."""
    figures = ("seconds", "recorded_seconds", "overhead", *PARTS, "bytes_down", "bytes_up")
    summary: dict[str, Any] = {figure: spread([row[figure] for row in rounds]) for figure in figures}
    for kind, seconds in plain.items():
        summary[f"plain_{kind}"] = spread(seconds)
        summary[f"over_plain_{kind}"] = summary["overhead"]["median"] / summary[f"plain_{kind}"]["median"]
    summary["rounds_below_bound"] = sum(row["overhead"] < BOUND for row in rounds)
    return summary


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def print_rounds(rows: Sequence[Mapping[str, Any]], number: int, load: float) -> None:
    """A line for the round that was completed just now."""
    for row in rows:
        if row["round"] == number:
            figures = f"{row['seconds']:>9.1f}{row['training']:>10.1f}{row['overhead']:>10.1f}"
            print(f"{number:>5}{figures}{load:>7.1f}", flush=True)
    if number == 1:
        print(f"{number:>5}  (not counted)", flush=True)


def table(results: Mapping[str, Any]) -> str:
    """What it comes to, for people."""
    found, rounds = results["summary"], results["rounds"]
    lines = [f"\nSeconds, median of {len(rounds)} rounds (least to most)"]
    lines += [line("a round", found["seconds"]), line("its overhead", found["overhead"])]
    lines += [line(f"  {title}", found[part]) for part, title in PARTS.items()]
    lines += [
        f"{line(f'Flower: {kind}', found[f'plain_{kind}'])}   the overhead is {found[f'over_plain_{kind}']:.2f} of it"
        for kind in results["plain"]
    ]
    lines += [f"{found['rounds_below_bound']} of {len(rounds)} rounds have an overhead below {BOUND:g} s"]
    size = results["model_bytes"]
    lines += [f"\nMB for each device and round; the model is {size / 1e6:.1f} MB in fp32"]
    for way in ("down", "up"):
        median = found[f"bytes_{way}"]["median"]
        lines += [f"{way:<34}{median / 1e6:>8.2f}   {median / size:.3f} of it"]
    lines += [f"\n{'Memory, MiB at most':<34}{'RSS':>8}{'PSS':>8}{'CPU s a round':>15}"]
    for row in results["processes"]:
        cpu = row["cpu_seconds"] / (len(rounds) + 1)
        figures = f"{row['resident_mib']:>8.0f}{row['proportional_mib']:>8.0f}{cpu:>15.2f}"
        lines += [f"{row['side'] + ': ' + row['role']:<34}{figures}"]
    for side, total in results["totals_mib"].items():
        lines += [f"{'all of ' + ('the server' if side == 'server' else 'one device'):<34}{'':>8}{total:>8.0f}"]
    return "\n".join(lines)


def line(title: str, found: Mapping[str, float]) -> str:
    return f"{title:<34}{found['median']:>8.1f}   ({found['least']:.1f} to {found['most']:.1f})"


if __name__ == "__main__":
    sys.exit(main())
