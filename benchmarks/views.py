"""Images per second of the view pipeline on one core, beside plain torchvision transforms over PIL, in one run.

    python benchmarks/views.py [--data PATH] [--json FILE]

Both sides turn the same compressed images into a normalized batch of views. They take turns, so that whatever else
the machine does hits both; figures are medians over the turns. "Per core" counts the process's CPU time.
"""

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from machine import machine_report, write_report
from PIL import Image
from yardstick_views import YardstickViews

from lowssl_core.sources import open_source
from lowssl_core.views import CpuViews, DeviceViews, ViewsConfig, normalize, pack_images, read_for_views

SEED = 0
TILE_HEIGHT, TILE_WIDTH = 375, 500
# What cameras write; at lower quality decoding costs less and the gain over the yardstick is larger.
JPEG_QUALITY = 95
PHOTOGRAPHS = {
    "skimage": [
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/retina.jpg",
        "data/rocket.jpg",
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder, zip or shards (default: photographs that the installed packages ship)")
    parser.add_argument("--images", type=int, default=16, help="images a turn (default: 16)")
    parser.add_argument("--turns", type=int, default=15, help="turns of each side (default: 15)")
    parser.add_argument("--local-size", type=int, default=128, help="pixels of a local view (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args(argv)

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    random.seed(SEED)
    torch.manual_seed(SEED)
    files = (read_files(options.data, options.images) if options.data else cut_tiles())[: options.images]
    sides = pipelines(ViewsConfig(), options.local_size, files)
    results = measure(sides, len(files), options.turns)
    kilobytes = round(statistics.mean(map(len, files)) / 1000)
    settings = {
        "data": options.data or f"{TILE_WIDTH} x {TILE_HEIGHT} tiles, JPEG quality {JPEG_QUALITY}",
        "mean_kilobytes": kilobytes,
        "images": len(files),
        "turns": options.turns,
        "views": f"2 x 224 + 6 x {options.local_size}",
    }
    print_table(results, settings)
    if options.json:
        write_report(options.json, results, settings=settings, seeds={"views": SEED})


def pipelines(config: ViewsConfig, local_size: int, files: list[bytes]) -> dict[str, Callable[[], object]]:
    """What is compared, each a call that makes one normalized batch of all files' views."""
    rng = np.random.default_rng(SEED)
    yardstick, fast = YardstickViews(config, local_size), CpuViews(config, local_size)

    def make_yardstick() -> list[torch.Tensor]:
        views = [yardstick(data) for data in files]
        return [torch.stack(column) for column in zip(*views, strict=True)]

    def make_fast() -> list[torch.Tensor]:
        views = [fast(data, rng) for data in files]
        return [
            normalize(torch.from_numpy(np.stack([one[kind][view] for one in views])))
            for kind, count in ((0, 2), (1, config.num_locals))
            for view in range(count)
        ]

    sides: dict[str, Callable[[], object]] = {"torchvision v1, PIL": make_yardstick, "lowssl, CPU": make_fast}
    if torch.cuda.is_available():
        device = DeviceViews(config, local_size, "cuda")

        def make_on_device() -> None:
            read = [read_for_views(data, config, local_size, rng) for data in files]
            device(pack_images([image for image, _ in read], [views for _, views in read]).pin_memory())
            torch.cuda.synchronize()

        packed = pack_images(*zip(*(read_for_views(data, config, local_size, rng) for data in files), strict=True))

        def make_on_device_decoded() -> None:
            device(packed)
            torch.cuda.synchronize()

        sides["lowssl, device"] = make_on_device
        sides["lowssl, device, images decoded"] = make_on_device_decoded
    return sides


def measure(sides: dict[str, Callable[[], object]], images: int, turns: int) -> list[dict[str, Any]]:
    """Median images/s of each side by CPU time and by the clock, and the median of the turns' gains over the first."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, make in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            make()
            if turn > 0:  # the first is for warming up
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    reference = next(iter(seconds.values()))
    results = []
    for name, times in seconds.items():
        gains = [[slow[clock] / fast[clock] for slow, fast in zip(reference, times, strict=True)] for clock in (0, 1)]
        results.append(
            {
                "pipeline": name,
                "images_per_core_second": images / statistics.median(cpu for cpu, _ in times),
                "images_per_second": images / statistics.median(wall for _, wall in times),
                "gain_per_core": statistics.median(gains[0]),
                "gain": statistics.median(gains[1]),
                "gain_per_core_lowest": min(gains[0]),
                "gain_per_core_highest": max(gains[0]),
            }
        )
    return results


def print_table(results: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """The settings in a line or two, then a row for each pipeline."""
    machine = machine_report()
    print(f"{machine['processor']}, {', '.join(machine['accelerators']) or 'no accelerator'}; one thread")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"\n{'pipeline':<32}{'images/s/core':>14}{'images/s':>10}{'gain/core':>11}  (lowest to highest){'gain':>8}")
    for row in results:
        spread = f"({row['gain_per_core_lowest']:.1f} to {row['gain_per_core_highest']:.1f})"
        print(
            f"{row['pipeline']:<32}{row['images_per_core_second']:>14.1f}{row['images_per_second']:>10.1f}"
            f"{row['gain_per_core']:>11.2f}  {spread:<19}{row['gain']:>8.2f}"
        )


def cut_tiles() -> list[bytes]:
    """500 x 375 JPEGs cut from installed photographs, two of each; one smaller than a tile is enlarged first."""
    tiles: list[bytes] = []
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed; its photographs are the default images")
        for name in names:
            photograph = Image.open(Path(spec.origin).parent / name).convert("RGB")
            grow = max(TILE_WIDTH / photograph.width, TILE_HEIGHT / photograph.height, 1)
            photograph = photograph.resize((round(photograph.width * grow), round(photograph.height * grow)))
            right, bottom = photograph.width - TILE_WIDTH, photograph.height - TILE_HEIGHT
            for left, top in ((0, 0), (right, bottom)):
                stream = io.BytesIO()
                tile = photograph.crop((left, top, left + TILE_WIDTH, top + TILE_HEIGHT))
                tile.save(stream, "JPEG", quality=JPEG_QUALITY)
                tiles.append(stream.getvalue())
    return tiles


def read_files(path: str, count: int) -> list[bytes]:
    """The first compressed images of a source."""
    source = open_source(path)
    files = [image for image in map(source.read, range(min(count, len(source)))) if isinstance(image, bytes)]
    if not files:
        raise SystemExit(f"{path}: holds pixels; this benchmark decodes, so give compressed images")
    return files


if __name__ == "__main__":
    main()
