"""A checkpoint gives a run back to the last bit, or is refused in one line; a crash never leaves a part of one."""

import dataclasses
import os
import signal
from itertools import islice

import pytest
import torch

from lowssl_core.backbones import BackboneConfig
from lowssl_core.checkpoint import (
    Checkpoint,
    backbone_state,
    load_checkpoint,
    restore,
    save_checkpoint,
    take_checkpoint,
)
from lowssl_core.compute import ComputeConfig, prepare
from lowssl_core.errors import UserError
from lowssl_core.loader import DataConfig
from lowssl_core.methods import METHODS, DINOConfig, MoCoConfig, SwAVConfig
from lowssl_core.optim import OptimConfig
from lowssl_core.recipe import Recipe
from lowssl_core.schedules import Progress
from lowssl_core.tensor_file import write_tensors
from lowssl_core.train import train
from lowssl_core.views import Views

BATCH = 4
SMALL = {
    "dino": DINOConfig(hidden=24, bottleneck=10, outputs=14),
    "swav": SwAVConfig(hidden=24, outputs=10, prototypes=14, queue_length=2 * BATCH, queue_start_epoch=1),
    "moco": MoCoConfig(hidden=24, outputs=10, queue_length=3 * BATCH + 2),
}
OPTIMIZERS = {
    "lars": OptimConfig(name="lars"),
    "adamw": OptimConfig(name="adamw", base_lr=0.0005, weight_decay=0.04),
    "sgd": OptimConfig(name="sgd", base_lr=0.1),
}
START = Progress(step=0, total_steps=12, steps_per_epoch=3)


def recipe_of(method: str, optim: str = "lars") -> Recipe:
    return Recipe(
        method=SMALL[method],
        backbone=BackboneConfig(name="resnet_tiny"),
        optim=OPTIMIZERS[optim],
        data=DataConfig(batch_size=BATCH),
    )


def built(recipe: Recipe, seed: int = 0):
    torch.manual_seed(seed)
    method = prepare(recipe.method.build(recipe.backbone, BATCH), torch.device("cpu"), ComputeConfig())
    return method, recipe.optim.build(method)


def batches(first: int = 0):
    generator = torch.Generator()
    while True:
        generator.manual_seed(first)
        yield Views(
            [torch.randn(BATCH, 3, 24, 24, generator=generator) for _ in range(2)],
            [torch.randn(BATCH, 3, 12, 12, generator=generator)],
        )
        first += 1


def run(method, optimizer, recipe, progress, steps):
    """Some steps from `progress` on; returns the clock after them."""
    reports = train(method, batches(progress.step), optimizer, recipe.optim.schedule(BATCH), start=progress)
    return list(islice(reports, steps))[-1].progress


def trained(method: str, optim: str = "lars"):
    """A run after five steps: its recipe, its clock, its method, its optimizer, and a checkpoint of them."""
    recipe = recipe_of(method, optim)
    model, optimizer = built(recipe)
    progress = run(model, optimizer, recipe, START, 5)
    facts = {"seconds": 1.25, "data": {"images": 12, "description": "twelve images"}}
    checkpoint = take_checkpoint(model, optimizer, recipe=recipe, progress=progress, facts=facts)
    # What was taken is still the run's own memory: the copy is what the run must be given back as.
    tensors = {name: value.clone(memory_format=torch.preserve_format) for name, value in checkpoint.tensors.items()}
    return (
        recipe,
        progress,
        model,
        optimizer,
        Checkpoint(recipe=recipe, progress=progress, facts=facts, tensors=tensors),
    )


def small_checkpoint() -> Checkpoint:
    return Checkpoint(
        recipe=recipe_of("moco"),
        progress=Progress(step=5, total_steps=12, steps_per_epoch=3),
        facts={"seconds": 1.25},
        tensors={"method.weight": torch.arange(6.0).view(2, 3), "rng.cpu": torch.get_rng_state().unsqueeze(0)[:, :16]},
    )


def assert_same_bits(tensors, others):
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name


def refusal_of(path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def states(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def memory_order(tensor):
    """Dimensions by stride, longest first; those of size 1 lie anywhere."""
    return sorted((d for d in range(tensor.ndim) if tensor.shape[d] > 1), key=lambda d: -tensor.stride(d))


# Round trip


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_gives_back_every_tensor_bit_for_bit(name, tmp_path):
    recipe, progress, _, _, taken = trained(name)
    save_checkpoint(tmp_path / "run.safetensors", taken)
    loaded = load_checkpoint(tmp_path / "run.safetensors")
    assert (loaded.recipe, loaded.progress, loaded.facts) == (recipe, progress, taken.facts)
    assert_same_bits(loaded.tensors, taken.tensors)

    method, optimizer = built(recipe, seed=1)
    torch.manual_seed(2)
    restore(loaded, method, optimizer, recipe=recipe)
    again = take_checkpoint(method, optimizer, recipe=recipe, progress=loaded.progress, facts=loaded.facts)
    assert_same_bits(again.tensors, taken.tensors)


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_holds_all_that_a_method_and_its_optimizer_remember(name):
    _, _, method, optimizer, taken = trained(name)
    names = set(taken.tensors)
    assert {f"method.{key}" for key, _ in method.named_parameters()} <= names
    assert {f"method.{key}" for key, _ in method.named_buffers()} <= names
    moved = {id(parameter): key for key, parameter in method.named_parameters() if parameter in optimizer.state}
    assert {f"optimizer.{key}.momentum_buffer" for key in moved.values()} <= names
    special = {
        "dino": {"method.center"},
        "moco": {"method.queue", "method.queue_end"},
        "swav": {"method.queue", "method._extra_state"},
    }
    assert special[name] <= names
    assert taken.tensors["rng.cpu"].shape == (1, len(torch.get_rng_state()))
    assert all(taken.tensors[key].abs().sum() > 0 for key in special[name])


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(name, optim, tmp_path):
    recipe, progress, method, optimizer, taken = trained(name, optim)
    save_checkpoint(tmp_path / "run.safetensors", taken)
    run(method, optimizer, recipe, progress, 3)
    straight = method.state_dict()

    restored, optimizer = built(recipe, seed=1)
    loaded = load_checkpoint(tmp_path / "run.safetensors")
    restore(loaded, restored, optimizer, recipe=recipe)
    run(restored, optimizer, recipe, loaded.progress, 3)
    assert_same_bits(restored.state_dict(), straight)


def test_restoring_brings_the_random_numbers_back():
    recipe, _, method, optimizer, taken = trained("moco")
    torch.set_rng_state(taken.tensors["rng.cpu"][0])
    expected = torch.rand(5)
    torch.manual_seed(9)
    restore(taken, method, optimizer, recipe=recipe)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_own_random_numbers_back(rank, monkeypatch):
    recipe, _, method, optimizer, taken = trained("moco")
    torch.manual_seed(5)
    torch.rand(rank + 1)
    expected = torch.rand(5)
    states = []
    for each in (0, 1):
        torch.manual_seed(5)
        torch.rand(each + 1)
        states.append(torch.get_rng_state())
    both = dataclasses.replace(taken, tensors={**taken.tensors, "rng.cpu": torch.stack(states)})
    monkeypatch.setattr("lowssl_core.checkpoint.world_size", lambda: 2)
    monkeypatch.setattr("lowssl_core.checkpoint.rank", lambda: rank)
    restore(both, method, optimizer, recipe=recipe)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_restored_optimizer_state_lies_in_memory_as_the_weights_do(optim, tmp_path):
    recipe, _, _, original, taken = trained("dino", optim)
    save_checkpoint(tmp_path / "run.safetensors", taken)
    method, optimizer = built(recipe, seed=1)
    restore(load_checkpoint(tmp_path / "run.safetensors"), method, optimizer, recipe=recipe)
    orders = [
        {(place, key): memory_order(value) for place, state in enumerate(states(each)) for key, value in state.items()}
        for each in (original, optimizer)
    ]
    assert orders[0] == orders[1]
    assert [0, 2, 3, 1] in orders[0].values()  # channels_last


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_a_branchs_backbone_can_be_taken_out(branch):
    _, _, method, _, taken = trained("moco")
    network = method.online if branch == "student" else method.teacher
    assert_same_bits(backbone_state(taken, branch), network.backbone.state_dict())


def test_a_teacher_that_a_method_has_not_is_refused():
    with pytest.raises(UserError, match="a swav checkpoint has no teacher"):
        backbone_state(trained("swav")[-1], "teacher")


def test_another_recipe_is_refused_with_what_differs():
    _, _, method, optimizer, taken = trained("moco")
    other = recipe_of("moco", "sgd")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(UserError) as caught:
        restore(taken, method, optimizer, recipe=other)
    assert "optim.name: 'lars', 'sgd'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same_bits(method.state_dict(), before)


# Damage


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, small_checkpoint())
    whole = path.read_bytes()
    load_checkpoint(path)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refusal_of(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, trained("moco")[-1])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refusal_of(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    missing, folder, text, encoder = (tmp_path / name for name in ("missing", "folder", "text", "encoder"))
    folder.mkdir()
    text.write_text("a shopping list, longer than eight bytes")
    write_tensors(encoder, {"weight": torch.ones(2)}, format="lowssl-encoder-1", facts={})
    assert "No such file" in refusal_of(missing)
    refusal_of(folder)
    assert "no safetensors file" in refusal_of(text)
    assert "'lowssl-encoder-1', not 'lowssl-checkpoint-1'" in refusal_of(encoder)


# Atomic


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    path = tmp_path / "run.safetensors"
    old = small_checkpoint()
    save_checkpoint(path, old)
    new = Checkpoint(recipe=old.recipe, progress=old.progress, facts={"seconds": 9.0}, tensors=old.tensors)
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            save_checkpoint(path, new)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert load_checkpoint(path).facts == old.facts
    save_checkpoint(path, new)
    assert load_checkpoint(path).facts == new.facts


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, small_checkpoint())
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, small_checkpoint())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
