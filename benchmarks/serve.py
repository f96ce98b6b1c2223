"""What `/embed` costs beyond the encoder itself: beside the in-process loop and a naive endpoint, in one run.

    python benchmarks/serve.py [--backbones mobilenetv2 ...] [--sides 256 640 1280 4032] [--turns 3] [--json FILE]

The yardstick is a loop in a process of its own: decode, preprocess, ONNX Runtime, no HTTP, with as many threads as
cores, by the server's own decoder. It, a real `lowssl-server`, and the naive endpoint of naive_server.py take turns
under the same load, so that whatever else the machine does hits all; figures are medians over the turns. CPU time is
that of the measured process alone, read from /proc, so this runs on Linux.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import machine_report, write_report
from serve_files import SIDES, export_models, write_photographs

from lowssl_core.processes import free_port

HERE = Path(__file__).parent
CONNECTIONS = 16
OVERLOAD = 4
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Service:
    """A process that is measured: where to send images and how."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    multipart: bool = False

    @property
    def cpu_seconds(self) -> float:
        """User and system time that the process has taken so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def memory_mib(self) -> float:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv2"], help="default: mobilenetv2")
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="longer sides of the JPEGs in pixels")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"], choices=("fp32", "fp16", "int8"))
    parser.add_argument("--turns", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--seconds", type=float, default=8, help="of one turn (default: 8)")
    parser.add_argument("--overload-seconds", type=float, default=30, help="0 leaves the overload out (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args(argv)
    results: dict[str, Any] = {"rows": []}
    with tempfile.TemporaryDirectory() as folder:
        photographs = {side: write_photographs(Path(folder) / str(side), side) for side in options.sides}
        print(f"{machine_report()['processor']}, {len(os.sched_getaffinity(0))} cores; {options.turns} turns\n{HEADER}")
        for model, path in export_models(Path(folder) / "models", options.backbones, options.precisions).items():
            is_first = not results["rows"]
            with lowssl_server(path) as server, naive_server(path) as naive:
                # What a size costs beside the model does not depend on the model.
                for side in options.sides if is_first else options.sides[:1]:
                    services, files = (server, naive), photographs[side]
                    for row in compare(path, services, files, turns=options.turns, seconds=options.seconds):
                        results["rows"].append({"model": model, "side": side, **row})
                        print_row(results["rows"][-1])
                if is_first and options.overload_seconds:
                    results["overload"] = overload(server, photographs[options.sides[0]], options.overload_seconds)
        print_overload(results.get("overload"))
    if options.json:
        settings = {"connections": CONNECTIONS, "turns": options.turns, "seconds": options.seconds}
        write_report(options.json, results, settings=settings, seeds={"weights": 0})


def compare(
    model: Path, services: Sequence[Service], files: Sequence[Path], *, turns: int, seconds: float
) -> list[dict[str, Any]]:
    """Medians over the turns for the yardstick and for each service, all under the same load."""
    measured: dict[str, list[dict[str, float]]] = {}
    for turn in range(turns + 1):
        rows = {"in-process loop": yardstick(model, files, seconds if turn else 1)}
        for service in services:
            rows[service.name] = under_load(service, files, seconds if turn else 1)
        if turn:  # the first is for warming up
            for name, row in rows.items():
                measured.setdefault(name, []).append(row)
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in measured.items()
    }
    base = measured["in-process loop"]
    for name, rows in measured.items():
        shares = [
            row["images_per_cpu_second"] / own["images_per_cpu_second"] for row, own in zip(rows, base, strict=True)
        ]
        added = [row["one_ms"] - own["one_ms"] for row, own in zip(rows, base, strict=True)]
        medians[name] |= {"share": statistics.median(shares), "added_ms": statistics.median(added)}
    return [{"service": name, **row} for name, row in medians.items()]


def yardstick(model: Path, files: Sequence[Path], seconds: float) -> dict[str, float]:
    """The loop without HTTP, in a process of its own."""
    command = [sys.executable, str(HERE / "serve_loop.py"), str(model), "--seconds", str(seconds)]
    done = subprocess.run([*command, "--files", *map(str, files)], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def under_load(service: Service, files: Sequence[Path], seconds: float) -> dict[str, float]:
    """Figures of one service at 16 connections, and its median latency at one."""
    before = service.cpu_seconds
    tally = load(service, files, "--connections", str(CONNECTIONS), "--seconds", str(seconds))
    cpu = service.cpu_seconds - before
    assert set(tally["statuses"]) == {"200"}, tally
    assert tally["broken"] == 0, tally
    images = tally["statuses"]["200"]
    alone = load(service, files, "--connections", "1", "--seconds", str(max(1.0, seconds / 3)))
    return {
        "images_per_second": images / tally["seconds"],
        "images_per_cpu_second": images / cpu,
        "cpu_ms": 1000 * cpu / images,
        **{name: tally["milliseconds"][name] for name in ("p50", "p95", "p99")},
        "one_ms": alone["milliseconds"]["p50"],
        "memory_mib": service.memory_mib,
    }


def overload(server: Service, files: Sequence[Path], seconds: float) -> dict[str, Any]:
    """Requests at four times of what the server can answer: what it answers, and whether its memory stays flat."""
    capacity = under_load(server, files, 5)["images_per_second"]
    load(server, files, "--rate", str(OVERLOAD * capacity), "--seconds", "3")
    memory, before = server.memory_mib, server.cpu_seconds
    tally = load(server, files, "--rate", str(OVERLOAD * capacity), "--seconds", str(seconds))
    return {
        "capacity": capacity,
        "asked_per_second": OVERLOAD * capacity,
        "answered_per_second": tally["statuses"].get("200", 0) / tally["seconds"],
        **tally,
        "cpu_seconds": server.cpu_seconds - before,
        "memory_mib_before": memory,
        "memory_mib_after": server.memory_mib,
    }


def load(service: Service, files: Sequence[Path], *arguments: str) -> dict[str, Any]:
    """Put load on a service from another process; what came back."""
    command = [sys.executable, str(HERE / "load.py"), service.url, *arguments]
    command += ["--multipart"] if service.multipart else []
    done = subprocess.run([*command, "--files", *map(str, files)], capture_output=True, text=True, check=True)
    tally: dict[str, Any] = json.loads(done.stdout)
    return tally


@contextmanager
def lowssl_server(model: Path) -> Iterator[Service]:
    """`lowssl-server` with one encoder in a new registry; forced, for random weights pass no gate."""
    with tempfile.TemporaryDirectory() as folder:
        registry = [sys.executable, "-m", "lowssl_core.command_line", "registry"]
        subprocess.run([*registry, "import", str(model), "--data-dir", folder], check=True, capture_output=True)
        promote = [*registry, "promote", "v1", "--force", "--why", "benchmark", "--data-dir", folder]
        subprocess.run(promote, check=True, capture_output=True)
        port = free_port()
        command = [sys.executable, "-m", "server.main", "--data-dir", folder, "--port", str(port)]
        with running(command, f"http://127.0.0.1:{port}/readyz") as process:
            yield Service("lowssl-server", process, f"http://127.0.0.1:{port}/embed")


@contextmanager
def naive_server(model: Path) -> Iterator[Service]:
    """The endpoint of naive_server.py."""
    port = free_port()
    command = [sys.executable, str(HERE / "naive_server.py"), str(model), "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}/openapi.json") as process:
        yield Service("naive endpoint", process, f"http://127.0.0.1:{port}/embed", multipart=True)


@contextmanager
def running(command: Sequence[str], ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers at `ready`, until the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            try:
                urllib.request.urlopen(ready, timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


HEADER = (
    f"{'model':<18}{'JPEG px':>8}  {'':<16}{'images/s':>9}{'img/CPU s':>10}{'share':>7}"
    f"{'p50':>8}{'p95':>8}{'p99':>8}{'one, ms':>9}{'added':>7}{'MiB':>6}"
)


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    print(
        f"{row['model']:<18}{row['side']:>8}  {row['service']:<16}{row['images_per_second']:>9.1f}"
        f"{row['images_per_cpu_second']:>10.1f}{row['share']:>7.2f}"
        f"{row['p50']:>8.0f}{row['p95']:>8.0f}{row['p99']:>8.0f}{row['one_ms']:>9.1f}{row['added_ms']:>7.1f}"
        f"{row['memory_mib']:>6.0f}",
        flush=True,
    )


def print_overload(found: dict[str, Any] | None) -> None:
    """What the overload came to, in a few lines."""
    if found is None:
        return
    print(
        f"\noverload: {found['asked_per_second']:.0f} requests/s asked of a capacity of {found['capacity']:.0f}, "
        f"{found['seconds']:.0f} s: {found['statuses']}, {found['broken']} broken connections, "
        f"{found['without_retry_after']} refusals without Retry-After\n"
        f"{found['answered_per_second']:.0f} answered a second; p50, p99 of those {found['milliseconds']['p50']:.0f}, "
        f"{found['milliseconds']['p99']:.0f} ms; of refusals {found['refusals'].get('p50', 0):.1f}, "
        f"{found['refusals'].get('p99', 0):.1f} ms; "
        f"memory {found['memory_mib_before']:.0f} -> {found['memory_mib_after']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
