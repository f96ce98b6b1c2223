"""The machine, the versions and the seeds behind a benchmark's figures, and writing them as JSON."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "lowssl",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "scikit-image",
    "onnxruntime",
)


def machine_report() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, accelerators, thread counts and versions."""
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerators": accelerators,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def write_report(path: Path, results: Any, *, settings: dict[str, Any], seeds: dict[str, int]) -> None:
    """Write `results` as JSON, with what it takes to repeat them."""
    report = {"machine": machine_report(), "settings": settings, "seeds": seeds, "results": results}
    path.write_text(json.dumps(report, indent=2) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
