"""Two processes give the result of one on the same global batches, to the rounding of sums in another order."""

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrain import arguments, photographs

from lowssl_core.backbones import BackboneConfig
from lowssl_core.checkpoint import load_checkpoint
from lowssl_core.distributed import Ranks, any_rank, barrier, gather_rows, mean_over_ranks, process_group
from lowssl_core.journal import read_metrics
from lowssl_core.methods import METHODS, DINOConfig, MoCoConfig, SwAVConfig
from lowssl_core.methods.swav import sinkhorn
from lowssl_core.optim import OptimConfig
from lowssl_core.pretrain import main
from lowssl_core.schedules import Progress
from lowssl_core.train import train
from lowssl_core.views import Views

WORLD, BATCH, STEPS = 2, 8, 8
# fp32 sums of eight steps, taken in another order: agreement to four digits, and to 1e-5 near zero.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# No BatchNorm in backbone or head: statistics are each rank's own on CPUs. SwAV's head has one: it stands still.
VIT = BackboneConfig(name="test_vit")
SMALL = {
    "dino": DINOConfig(
        hidden=24,
        bottleneck=10,
        outputs=14,
        head_batchnorm=False,
        momentum=0.9,
        teacher_temperature_start=0.2,
        teacher_temperature=0.2,
    ),
    "swav": SwAVConfig(hidden=24, outputs=10, prototypes=14, queue_length=2 * BATCH, queue_start_epoch=1),
    "moco": MoCoConfig(hidden=24, outputs=10, queue_length=3 * BATCH + 4, momentum=0.9),
}
SPECIAL = {"dino": ("center",), "swav": ("queue", "prototypes.weight"), "moco": ("queue", "queue_end")}
OPTIM = OptimConfig(name="sgd", base_lr=0.064, final_lr=0.001)
PATIENCE = 150.0


def global_batch(step: int) -> Views:
    generator = torch.Generator().manual_seed(step)
    return Views(
        [torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(2)],
        [torch.randn(BATCH, 3, 16, 16, generator=generator) for _ in range(2)],
    )


def part_of(views: Views, rank: int, world: int) -> Views:
    return Views(
        [view.chunk(world)[rank] for view in views.globals], [view.chunk(world)[rank] for view in views.locals]
    )


def scores() -> torch.Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(7))


def results(rank: int, world: int) -> dict[str, torch.Tensor]:
    """What a rank has in the end: for each method its state, and the loss of each step of its part of the batch."""
    found = {"sinkhorn": sinkhorn(scores().chunk(world)[rank], 0.05, 3)}
    for name, config in SMALL.items():
        torch.manual_seed(0)
        method = config.build(VIT, BATCH).train()
        if name == "swav":
            method.online.head.eval()
        torch.manual_seed(100 + rank)  # ranks draw different numbers, as in a run
        optimizer = OPTIM.build(method)
        start = Progress(step=0, total_steps=STEPS, steps_per_epoch=2)
        batches = (part_of(global_batch(step), rank, world) for step in range(STEPS))
        reports = list(train(method, batches, optimizer, OPTIM.schedule(BATCH), start=start, alpha=0.4))
        found[f"{name}.losses"] = torch.stack([report.loss for report in reports])
        for signal_name in reports[-1].signals.keys() & {"target_entropy", "key_found"}:
            values = torch.stack([report.signals[signal_name] for report in reports])
            found[f"{name}.signals.{signal_name}"] = values
        found |= {f"{name}.state.{key}": value for key, value in method.state_dict().items()}
    return {key: value.detach().contiguous().clone() for key, value in found.items()}


def work(rank: int, folder: str) -> None:
    """One of two processes: the words between ranks, then the methods."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with process_group(torch.device("cpu")) as ranks:
        assert ranks == Ranks(rank, WORLD, rank)
        assert ranks.is_first == (rank == 0)
        rows = torch.arange(6.0).view(3, 2) + 10 * rank
        assert gather_rows(rows).tolist() == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13], [14, 15]]
        assert gather_rows(rows.T)[2].tolist() == [10, 12, 14]
        values = torch.tensor([1.0, 4.0]) * (rank + 1)
        assert mean_over_ranks(values).tolist() == [1.5, 6.0]
        assert values.tolist() == [rank + 1, 4 * (rank + 1)]
        assert [any_rank(flag) for flag in (False, True, rank == 0, rank == 1)] == [False, True, True, True]
        save_file(results(rank, WORLD), Path(folder) / f"{rank}.safetensors")
        barrier()


@pytest.fixture(scope="module")
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory, port):
    """The results of two real processes, joined by gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        environment = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for key, value in (environment | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(key, value)
        torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one():
    """The results of one process on the whole batches."""
    return results(0, 1)


def test_alone_each_word_between_ranks_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as ranks:
        assert ranks == Ranks(0, 1, 0)
        rows = torch.randn(3, 2)
        assert gather_rows(rows) is rows
        assert mean_over_ranks(rows) is rows
        assert any_rank(True)
        assert not any_rank(False)
        barrier()


def test_sinkhorns_assignments_are_those_of_all_samples_together(both, one):
    together = torch.cat([rank["sinkhorn"] for rank in both])
    torch.testing.assert_close(together, one["sinkhorn"], **CLOSE)
    apart = torch.cat([sinkhorn(part, 0.05, 3) for part in scores().chunk(WORLD)])
    assert (apart - together).abs().max() > 0.01  # it is the exchange that makes them equal


@pytest.mark.parametrize("name", METHODS)
def test_ranks_hold_the_same_state_to_the_bit(name, both):
    keys = [key for key in both[0] if key.startswith(f"{name}.state.")]
    assert keys
    assert [key for key in keys if not torch.equal(both[0][key], both[1][key])] == []


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_end_with_the_state_of_one_process(name, both, one):
    keys = [key for key in one if key.startswith(f"{name}.state.")]
    assert {f"{name}.state.{special}" for special in SPECIAL[name]} <= set(keys)
    for key in keys:
        torch.testing.assert_close(both[0][key], one[key], msg=lambda text, key=key: f"{key}: {text}", **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_of_the_ranks_losses_and_signals_is_that_of_one_process(name, both, one):
    keys = [key for key in one if key.startswith((f"{name}.losses", f"{name}.signals."))]
    assert len(keys) == 2
    for key in keys:
        mean = (both[0][key] + both[1][key]) / 2
        torch.testing.assert_close(mean, one[key], **CLOSE)
    assert (both[0][f"{name}.losses"] - both[1][f"{name}.losses"]).abs().max() > 0.01  # each saw its own part


def test_keys_enter_the_queue_in_the_order_of_the_global_batch(both):
    torch.manual_seed(0)
    method = SMALL["moco"].build(VIT, BATCH).train()
    views = global_batch(0)
    start = Progress(step=0, total_steps=STEPS, steps_per_epoch=2)
    expected, _ = method.teacher(views.globals[:1])
    list(islice(train(method, [views], OPTIM.build(method), OPTIM.schedule(BATCH), start=start), 1))
    torch.testing.assert_close(method.queue[:BATCH], expected[0], **CLOSE)
    # 8 steps of 8 keys into 28 places: the end has come round twice.
    assert both[0]["moco.state.queue_end"].item() == STEPS * BATCH % (3 * BATCH + 4)


def test_dinos_center_is_the_moving_mean_over_all_ranks_rows():
    torch.manual_seed(0)
    method = SMALL["dino"].build(VIT, BATCH).train()
    views = global_batch(0)
    logits, _ = method.teacher(views.globals)
    method(views, Progress(step=0, total_steps=STEPS, steps_per_epoch=2))
    halves = [part.mean(dim=(0, 1)) for part in logits.chunk(WORLD, dim=1)]
    torch.testing.assert_close(method.center, 0.1 * sum(halves) / WORLD, **CLOSE)


# The command

RECIPE = """
epochs = 4
alpha = 0.4
[backbone]
name = "test_vit"
[method]
name = "dino"
hidden = 24
bottleneck = 10
outputs = 14
head_batchnorm = false
[views]
global_size = 32
num_locals = 1
local_size = 16
[data]
batch_size = 4
[optim]
name = "sgd"
base_lr = 0.064
final_lr = 0.001
[monitor]
log_every_steps = 1
quality_every_epochs = 0
quality_images = 6
"""


def start_ranks(argv: list[str], port: str) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun starts them."""
    shared = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "lowssl_core.pretrain", *argv],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The status and the output of each process."""
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_a_distributed_run_stops_together_and_ends_where_one_process_does(tmp_path, port):
    data, recipe = photographs(tmp_path / "images", 100), tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    folder, alone = tmp_path / "ranks", tmp_path / "alone"
    argv = arguments(str(recipe), data, folder)
    processes = start_ranks(argv, port)
    metrics = folder / "metrics.jsonl"
    while processes[0].poll() is None and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.01)
    # Only the second rank hears the signal; both stop when they next look at each other.
    processes[1].send_signal(signal.SIGTERM)
    first, second = ends(processes)
    assert (first[0], second[0]) == (130, 143), (first, second)
    assert "stopped by a signal to another rank" in first[1]
    assert [line for line in second[1].splitlines() if "[Gloo]" not in line] == []  # torch 2.8's gloo greets
    stopped = load_checkpoint(folder / "checkpoint.safetensors")
    assert 10 < stopped.progress.step < 100
    assert stopped.progress.step % 10 == 0 or stopped.progress.step % 25 == 0
    assert stopped.tensors["rng.cpu"].shape[0] == WORLD

    resumed = ends(start_ranks([*argv, "--resume"], port))
    assert [status for status, _ in resumed] == [0, 0], resumed
    assert main(arguments(str(recipe), data, alone)) == 0
    end, expected = (load_checkpoint(each / "checkpoint.safetensors") for each in (folder, alone))
    assert end.progress == expected.progress
    for key in end.tensors.keys() - {"rng.cpu"}:
        torch.testing.assert_close(end.tensors[key], expected.tensors[key], rtol=1e-3, atol=1e-4)
    expected_losses = [row["loss"] for row in read_metrics(alone, "train")]
    rows = read_metrics(folder, "train")
    for before, row in pairwise([{"step": 0}, *rows]):
        stretch = expected_losses[before["step"] : row["step"]]
        assert row["loss"] == pytest.approx(sum(stretch) / len(stretch), rel=1e-3)
    assert rows[-1]["step"] == 100
    assert [row["ranks"] for row in read_metrics(folder, "start")] == [WORLD, WORLD]
