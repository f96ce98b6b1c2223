"""Images per second and peak memory of a training step, beside plain code for the same mathematics, in one run.

    python benchmarks/step.py [--methods moco,swav,dino] [--backbones mobilenetv2,resnet18] [--json FILE]

Every side runs in a process of its own, so that its peak memory is its own; the two take turns, step by step, so that
whatever else the machine does hits both. Figures are medians over the turns. "Per core" counts a process's CPU time.
Inputs are random views that stay in memory. With a GPU, the whole recipes (224/128 px, bf16) follow, fed with JPEGs.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine_report, write_report
from step_cases import SEED, Case, Timing, Worker
from step_with_data import measure_with_data, print_data_table

from lowssl_core.backbones import BACKBONES
from lowssl_core.compute import choose_device
from lowssl_core.methods import METHODS

BACKBONE_NAMES = ("mobilenetv2", "resnet18", "resnet34", "vit_tiny")
FULL_BACKBONES = ("resnet18", "mobilenetv2")


def main(argv: Sequence[str] | None = None) -> None:
    options = _arguments().parse_args(argv)
    # Threads that wait by spinning slow each other down wherever cores are shared, and count as CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    device = choose_device(options.device)
    threads = options.threads or torch.get_num_threads()
    results, data_results = [], []
    print(f"{_describe_machine()}; {threads} threads, device {device}")
    print(
        f"batch {options.batch}, globals {options.global_size} px, locals {options.local_size} px (vit_tiny: to 16)\n"
    )
    _print_heading()
    for backbone in options.backbones:
        for method in options.methods:
            case = Case(
                method=method,
                backbone=backbone,
                batch=options.batch,
                global_size=options.global_size,
                local_size=options.local_size,
                queue_length=options.queue_length,
                device=str(device),
                threads=threads,
            )
            results.append(measure(case, options.turns))
            _print_row(results[-1])
    if device.type == "cpu":
        print("\nNo GPU in use: the full recipes, waiting for data and views made on the device are not measured.")
    else:
        for backbone in options.full_backbones:
            for method in options.methods:
                full = Case(method=method, backbone=backbone, batch=options.full_batch, device=str(device))
                results.append(measure(full, options.turns))
                _print_row(results[-1])
                data_results.append(measure_with_data(full, options.data, options.workers))
        print_data_table(data_results)
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        write_report(
            options.json,
            {"steps": results, "with_data": data_results},
            settings=settings | {"threads": threads, "device": str(device), "load": os.getloadavg()},
            seeds={"weights_and_views": SEED},
        )


def _arguments() -> argparse.ArgumentParser:
    def names(known: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            found = [name for name in text.split(",") if name]
            unknown = [name for name in found if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: wanted some of {', '.join(known)}")
            return found

        return parse

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    methods, backbones = list(METHODS), list(BACKBONES)
    parser.add_argument("--methods", type=names(methods), default=methods, help=f"default: {','.join(methods)}")
    parser.add_argument(
        "--backbones",
        type=names(backbones),
        default=list(BACKBONE_NAMES),
        help=f"of {','.join(backbones)} (default: {','.join(BACKBONE_NAMES)})",
    )
    parser.add_argument("--batch", type=int, default=16, help="images a step (default: 16)")
    parser.add_argument("--global-size", type=int, default=96, help="pixels of a global view (default: 96)")
    parser.add_argument("--local-size", type=int, default=54, help="pixels of a local view (default: 54)")
    parser.add_argument(
        "--queue-length",
        type=int,
        default=12288,
        help="MoCo's keys (default: 12288, to the recipe's 65536 as 96 px are to 224 px in area)",
    )
    parser.add_argument("--turns", type=int, default=3, help="steps of each side that count (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of each side (default: torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--full-backbones",
        type=names(backbones),
        default=list(FULL_BACKBONES),
        help=f"GPU: trained at the full recipe (default: {','.join(FULL_BACKBONES)})",
    )
    parser.add_argument("--full-batch", type=int, default=128, help="GPU: images a step there (default: 128)")
    parser.add_argument(
        "--data", help="GPU: images to feed it with (default: 500 x 375 JPEGs of installed photographs)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="GPU: loading processes (default: cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def measure(case: Case, turns: int) -> dict[str, Any]:
    """Medians of the fast and the plain step of one method and backbone, taking turns."""
    with Worker(case, plain=True) as plain, Worker(case, plain=False) as fast:
        times: list[tuple[Timing, Timing]] = []
        for turn in range(turns + 1):
            pair = plain.step(), fast.step()
            if turn > 0:  # the first is for warming up
                times.append(pair)
        peaks = plain.peak_mib(), fast.peak_mib()
    result: dict[str, Any] = case.as_dict() | {"turns": turns}
    for index, side in enumerate(("plain", "fast")):
        result[f"{side}_images_per_second"] = case.batch / statistics.median(pair[index].wall for pair in times)
        result[f"{side}_images_per_core_second"] = case.batch / statistics.median(pair[index].cpu for pair in times)
        result[f"{side}_peak_mib"] = peaks[index]
    for name, clock in (("gain", "wall"), ("gain_per_core", "cpu")):
        gains = [getattr(slow, clock) / getattr(quick, clock) for slow, quick in times]
        result |= {name: statistics.median(gains), f"{name}_lowest": min(gains), f"{name}_highest": max(gains)}
    return result


def _describe_machine() -> str:
    machine = machine_report()
    accelerators = ", ".join(machine["accelerators"]) or "no accelerator"
    return f"{machine['processor']}, {machine['cores']} cores, {accelerators}, load {os.getloadavg()[0]:.1f}"


def _print_heading() -> None:
    print(
        f"{'method':<7}{'backbone':<13}{'px':>8}  {'images/s, plain':>16}{'fast':>8}{'gain':>7}"
        f"  {'images/s/core, plain':>21}{'fast':>8}{'gain':>7}  (lowest to highest)  {'peak MiB, plain':>16}{'fast':>7}"
    )


def _print_row(row: dict[str, Any]) -> None:
    spread = f"({row['gain_per_core_lowest']:.2f} to {row['gain_per_core_highest']:.2f})"
    print(
        f"{row['method']:<7}{row['backbone']:<13}{row['global_size']:>4}/{row['local_size']:<3}"
        f"  {row['plain_images_per_second']:>16.1f}{row['fast_images_per_second']:>8.1f}{row['gain']:>7.2f}"
        f"  {row['plain_images_per_core_second']:>21.1f}{row['fast_images_per_core_second']:>8.1f}"
        f"{row['gain_per_core']:>7.2f}  {spread:<19}  {row['plain_peak_mib']:>16.0f}{row['fast_peak_mib']:>7.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
