"""How long a GPU waits for data at the full recipe, with views made by the CPU's cores and by the device."""

import multiprocessing
import tempfile
import time
from itertools import islice, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from step_cases import START, Case, build_method, random_views, synchronize

from lowssl_core.loader import Loader
from lowssl_core.sources import open_source
from lowssl_core.train import train

STEPS_ALONE = 20
# Copies of each tile: together they must be more than a batch, and they are read from the file system's cache.
COPIES = 32


def measure_with_data(case: Case, data: str | None, workers: int) -> dict[str, Any]:
    """Images/s of a case's fast step on views in memory and on real images, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            _write_tiles(Path(folder))
        context = multiprocessing.get_context("spawn")
        connection, other_end = context.Pipe()
        process = context.Process(target=_work, args=(other_end, case, data or folder, workers))
        process.start()
        other_end.close()
        rates: dict[str, float] = connection.recv()
        process.join()
    result: dict[str, Any] = case.as_dict() | {"data": data or "500 x 375 JPEGs", "workers": workers}
    for name, rate in rates.items():
        result[f"{name}_images_per_second"] = rate
    for mode in ("cpu", "device"):
        # What the step would gain if data cost nothing.
        result[f"{mode}_waiting"] = max(0.0, 1 - rates[mode] / rates["alone"])
    result["device_gain"] = rates["device"] / rates["cpu"]
    return result


def print_data_table(rows: list[dict[str, Any]]) -> None:
    """A row for each method and backbone."""
    print(
        f"\n{'method':<7}{'backbone':<13}{'images/s, no data':>18}{'CPU views':>11}{'waiting':>9}"
        f"{'device views':>14}{'waiting':>9}{'gain':>7}"
    )
    for row in rows:
        print(
            f"{row['method']:<7}{row['backbone']:<13}{row['alone_images_per_second']:>18.0f}"
            f"{row['cpu_images_per_second']:>11.0f}{row['cpu_waiting']:>9.0%}"
            f"{row['device_images_per_second']:>14.0f}{row['device_waiting']:>9.0%}{row['device_gain']:>7.2f}"
        )


def _write_tiles(folder: Path) -> None:
    from views import cut_tiles

    for number, tile in enumerate(cut_tiles() * COPIES):
        (folder / f"{number:05}.jpg").write_bytes(tile)


def _work(connection: Connection, case: Case, data: str, workers: int) -> None:
    connection.send(rates_with_data(case, data, workers))


def rates_with_data(case: Case, data: str, workers: int) -> dict[str, float]:
    """Images/s on views in memory ("alone") and on those of a loader in its modes "cpu" and "device"."""
    recipe, method = case.recipe(), build_method(case, plain=False)
    optimizer, schedule = recipe.optim.build(method), recipe.optim.schedule(case.batch)

    def rate(batches: Any, warm_up: int, counted: int) -> float:
        reports = train(method, batches, optimizer, schedule, start=START, alpha=recipe.alpha)
        for _ in islice(reports, warm_up):
            pass
        synchronize(case.device)
        began = time.perf_counter()
        for _ in islice(reports, counted):
            pass
        synchronize(case.device)
        return counted * case.batch / (time.perf_counter() - began)

    rates = {"alone": rate(repeat(random_views(case, plain=False)), STEPS_ALONE // 2, STEPS_ALONE)}
    source = open_source(data)
    for mode in ("cpu", "device"):
        loader = Loader(
            source,
            recipe.views,
            case.local_size,
            recipe.data,
            seed=recipe.seed,
            workers=workers,
            device=torch.device(case.device),
            mode=mode,
        )
        # Each worker has two batches ready at first: they are used up before the clock starts.
        rates[mode] = rate(loader.batches(), 2 * max(1, workers), 3 * max(1, workers))
    return rates
