"""The learner: rounds that go on to the bit after any kill, on images that it takes in once and remembers."""

import hashlib
import resource
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_train import SMALL

from client.arrivals import Arrivals, ArrivalsConfig
from client.learner import Learner, TrainingDivergedError
from client.learner_config import LearnerConfig
from client.memory import MemoryConfig, compact
from client.rounds import Budget, Outcome, RoundTask
from lowssl_core.backbones import BackboneConfig
from lowssl_core.encoder import load_encoder
from lowssl_core.errors import UserError
from lowssl_core.images import NotEnoughMemory
from lowssl_core.loader import DataConfig
from lowssl_core.methods import METHODS
from lowssl_core.optim import OptimConfig
from lowssl_core.photos import open_photos
from lowssl_core.protocol.manifest import pack, unpack
from lowssl_core.recipe import Recipe
from lowssl_core.tensor_file import TensorFile, read_tensors
from lowssl_core.views import ViewsConfig

PHOTOS = cache(open_photos)
CONFIG = LearnerConfig(
    tau=0.7,
    budget=Budget(new_images=16, steps=4),
    memory=MemoryConfig(max_bytes=1_000_000),
    save_every_steps=3,
    steps_per_epoch=3,
    refresh_images=10,
)


def recipe_of(method: str, **optim) -> Recipe:
    return Recipe(
        method=replace(SMALL[method], queue_length=16) if method != "dino" else SMALL[method],
        backbone=BackboneConfig(name="mobilenetv2_tiny"),
        data=DataConfig(batch_size=8, shrink_to=32),
        views=ViewsConfig(global_size=24, num_locals=2, local_size="matched"),
        optim=OptimConfig(**{"name": "adamw", "base_lr": 0.03, "warmup_steps": 2} | optim),
        alpha=0.4,
        seed=5,
    )


class Device:
    """A folder of images and a learner on it, which can be lost and made again."""

    def __init__(self, root: Path, recipe: Recipe, config: LearnerConfig = CONFIG) -> None:
        self.root, self.recipe, self.config = root, recipe, config
        (root / "images").mkdir(parents=True, exist_ok=True)
        self.open()

    def open(self) -> None:
        self.arrivals = Arrivals(self.root / "images", self.root / "state", ArrivalsConfig(settle_seconds=0))
        self.learner = Learner(self.recipe, self.config, self.arrivals, self.root / "state")

    def lose_power(self) -> None:
        """Forget all that is not on disk."""
        self.learner.close()
        self.arrivals.close()
        torch.manual_seed(999)  # nothing may depend on what the generator happens to be at
        self.open()

    def receive(self, first: int, count: int) -> None:
        for index in range(first, first + count):
            pixels = PHOTOS().read(7 * index)[..., ::-1]
            cv2.imwrite(str(self.root / "images" / f"{index:03d}.png"), pixels)

    def run(self, number: int, arrived: np.ndarray | None = None, **task) -> Outcome:
        self.learner.begin_round(arrived, RoundTask(number=number, **task))
        return self.rest_of_round()

    def rest_of_round(self) -> Outcome:
        for _ in self.learner.steps():
            pass
        return self.learner.finish_round()

    def packed(self) -> np.ndarray:
        return pack(self.learner.method.federated_state(), self.learner.manifest)

    def written(self) -> TensorFile:
        return read_tensors(self.root / "state" / "learner.safetensors")

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.written().tensors)


@pytest.fixture
def device(tmp_path) -> Device:
    return Device(tmp_path, recipe_of("dino"))


def models(device: Device) -> list[np.ndarray]:
    """Global models as a server would send them: other weights, sensible statistics."""
    learner = device.learner
    own = pack(learner.method.federated_state(), learner.manifest)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        flat = own.copy()
        trained = slice(learner.manifest.trained_size)
        flat[trained] += 0.01 * rng.normal(size=learner.manifest.trained_size).astype(np.float32)
        found.append(flat)
    return found


def assert_same(one: Device, other: Device) -> None:
    tensors, expected = one.tensors(), other.tensors()
    assert tensors.keys() == expected.keys()
    assert [key for key, value in tensors.items() if not torch.equal(value, expected[key])] == []
    for staged in (True, False):
        assert one.learner.memory.keys(staged=staged) == other.learner.memory.keys(staged=staged)
    assert one.arrivals.counts() == other.arrivals.counts()
    assert one.learner.progress == other.learner.progress
    assert one.written().facts["drift"] == other.written().facts["drift"]


# Going on


@pytest.mark.parametrize("name", METHODS)
def test_power_lost_after_any_step_ends_with_the_bits_of_a_straight_run(tmp_path, name):
    straight, lossy = (Device(tmp_path / kind, recipe_of(name, warmup_steps=0)) for kind in ("straight", "lossy"))
    first, second = models(straight)
    rounds = ((0, 14, first), (1, 20, second))
    taken = 0
    for number, count, arrived in rounds:
        for device in (straight, lossy):
            device.receive(40 * number, count)
        straight.run(number, arrived, proximal=0.1)

        lossy.learner.begin_round(arrived, RoundTask(number=number, proximal=0.1))
        lossy.lose_power()
        for steps in (1, 4, 100):  # saved every three steps: some of these are taken again
            for _, _ in zip(range(steps), lossy.learner.steps(), strict=False):
                taken += 1
            if steps < 100:
                lossy.lose_power()
        lossy.learner.finish_round()
        lossy.lose_power()
    assert lossy.learner.progress.step == 8 < taken
    assert_same(lossy, straight)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_client_learner import Device, recipe_of
from client.rounds import RoundTask

def work(root):
    device = Device(root, recipe_of("moco"))
    learner = device.learner
    while True:
        state = learner.state
        if not state.is_open:
            number = 0 if state.round is None else state.round.task.number + 1
            if number == 3:
                return
            device.receive(12 * number, 12)
            learner.begin_round(None, RoundTask(number=number))
        for _ in learner.steps():
            pass
        learner.finish_round()

root = Path(sys.argv[1])
rng = random.Random(1)
kills = 0
end = time.monotonic() + 10
while True:
    child = os.fork()
    if child == 0:
        work(root)
        os._exit(0)
    if time.monotonic() < end:
        time.sleep(0.12 * (1 + kills) * rng.random())  # the first fall into its start, wherever it is slow
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            kills += 1
    else:
        done = 0
    if not done:
        done, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
print(kills)
"""


def test_killed_at_random_moments_it_ends_with_the_bits_of_a_straight_run(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path / "killed"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    straight = Device(tmp_path / "straight", recipe_of("moco"))
    for number in range(3):
        straight.receive(12 * number, 12)
        straight.run(number)
    assert_same(Device(tmp_path / "killed", recipe_of("moco")), straight)


# Rounds


def test_the_first_global_model_is_taken_whole_and_the_average_begins_there(device):
    device.receive(0, 10)
    arrived, _ = models(device)
    plan = device.learner.begin_round(arrived, RoundTask(number=1))
    assert plan.mu == 0
    learner = device.learner
    np.testing.assert_array_equal(pack(learner.method.federated_state(), learner.manifest), arrived)
    for name, value in learner.method.online.state_dict().items():
        assert torch.equal(learner.method.teacher.state_dict()[name], value)
    assert not learner.delta()[: learner.manifest.trained_size].any()


def test_a_later_one_is_blended_and_what_is_private_stays(tmp_path):
    device = Device(tmp_path, recipe_of("moco"))
    device.receive(0, 20)
    first, second = models(device)
    device.run(1, first)
    device.run(2, first)  # the first one was that of the warm-up
    learner = device.learner
    own = pack(learner.method.federated_state(), learner.manifest)
    private = {
        name: value.clone()
        for name, value in learner.method.state_dict().items()
        if name.startswith(learner.method.private)
    }
    plan = learner.begin_round(second, RoundTask(number=3))
    assert plan.mu == pytest.approx(0.7)
    trained = slice(learner.manifest.trained_size)
    blended = pack(learner.method.federated_state(), learner.manifest)
    np.testing.assert_allclose(blended[trained], (0.7 * own + 0.3 * second)[trained], rtol=1e-4, atol=1e-6)
    assert {"queue", "queue_end"} <= private.keys()
    assert all(torch.equal(learner.method.state_dict()[name], value) for name, value in private.items())


def test_models_are_taken_whole_until_a_round_was_trained_past_the_warm_up(device):
    device.receive(0, 12)
    first, second = models(device)
    assert [device.run(number, model).round.mu for number, model in ((1, first), (2, second))] == [0, 0]
    assert device.run(3, first).round.mu == pytest.approx(0.7)


def test_the_delta_is_what_the_round_s_training_changed(device):
    device.receive(0, 12)
    first, second = models(device)
    device.run(1, first)
    device.run(2, second)
    learner = device.learner
    trained = slice(learner.manifest.trained_size)
    np.testing.assert_allclose((second + learner.delta())[trained], device.packed()[trained], rtol=1e-5, atol=1e-6)
    learner.begin_round(first, RoundTask(number=3))
    blended = device.packed()
    assert not np.allclose(blended[trained], first[trained])
    assert not learner.delta()[trained].any()
    for _ in learner.steps():
        pass
    assert learner.delta()[trained].any()
    np.testing.assert_allclose((blended + learner.delta())[trained], device.packed()[trained], rtol=1e-5, atol=1e-6)


def test_images_are_learned_once_and_then_remembered(device):
    device.receive(0, 20)
    learner = device.learner
    plan = learner.begin_round(None, RoundTask(number=1))
    assert (plan.new_images, plan.memory_images, plan.new_rows, plan.replayed_rows) == (16, 0, 8, 0)
    assert [report.progress.step for report in learner.steps()] == [1, 2, 3, 4]
    outcome = learner.finish_round()
    assert (outcome.steps, outcome.images, outcome.replayed_images) == (4, 16, 0)
    assert np.isfinite(outcome.loss)
    plan = learner.begin_round(None, RoundTask(number=2))
    assert (plan.new_images, plan.memory_images, plan.new_rows, plan.replayed_rows) == (4, 16, 2, 6)
    assert all("alignment" in report.signals for report in learner.steps())
    outcome = learner.finish_round()
    assert (outcome.images, outcome.replayed_images) == (20, 16)
    assert device.arrivals.counts().learned == 20
    # Nothing new: the memory alone.
    plan = learner.begin_round(None, RoundTask(number=3))
    assert (plan.new_images, plan.memory_images, plan.new_rows, plan.replayed_rows) == (0, 20, 0, 8)


def test_a_round_may_end_early_and_without_any_step_its_images_stay_new(device):
    device.receive(0, 10)
    learner = device.learner
    learner.begin_round(None, RoundTask(number=1))
    assert learner.finish_round().steps == 0
    assert device.arrivals.counts().new == 10
    learner.begin_round(None, RoundTask(number=2))
    next(iter(learner.steps()))
    assert learner.finish_round().steps == 1
    assert (device.arrivals.counts().new, learner.memory.stats().images) == (0, 10)


def test_without_images_there_is_nothing_to_do(device):
    learner = device.learner
    assert learner.begin_round(None, RoundTask(number=1)).steps == 0
    assert list(learner.steps()) == []
    outcome = learner.finish_round()
    assert (outcome.steps, outcome.images, outcome.loss) == (0, 0, None)


def test_files_may_vanish_once_they_are_taken_in(device):
    device.receive(0, 10)
    learner = device.learner
    learner.begin_round(None, RoundTask(number=1))
    for path in (device.root / "images").iterdir():
        path.unlink()
    assert len(list(learner.steps())) == 4
    learner.finish_round()
    assert learner.begin_round(None, RoundTask(number=2)).memory_images == 10


def test_an_image_too_large_for_the_memory_is_set_aside_and_holds_nobody_up(device):
    device.receive(0, 10)
    strip = np.concatenate([PHOTOS().read(7 * index) for index in range(120)], axis=1)
    cv2.imwrite(str(device.root / "images" / "strip.png"), strip)
    assert device.learner.begin_round(None, RoundTask(number=1)).new_images == 10
    ((name, reason),) = device.arrivals.set_aside().items()
    assert name == "strip.png"
    assert reason.startswith("huge: ")


def test_an_image_that_there_is_no_memory_for_stays_new_and_holds_nobody_up(device, monkeypatch):
    device.receive(0, 10)
    first = hashlib.sha256((device.root / "images/000.png").read_bytes()).hexdigest()

    def cramped(data: bytes, side: int) -> bytes:
        if hashlib.sha256(data).hexdigest() == first:
            raise NotEnoughMemory
        return compact(data, side)

    with monkeypatch.context() as patch:
        patch.setattr("client.intake.compact", cramped)
        device.run(1)
    assert device.arrivals.new(99) == [first]
    assert device.arrivals.set_aside() == {}
    device.run(2)
    assert (device.arrivals.counts().new, device.arrivals.counts().learned) == (0, 10)


def test_a_memory_that_was_lost_ends_the_round_and_not_the_learner(device):
    device.receive(0, 10)
    device.learner.begin_round(None, RoundTask(number=1))
    next(iter(device.learner.steps()))
    device.learner.save()
    device.learner.close()
    (device.root / "state/memory/memory.sqlite3").unlink()
    device.lose_power()
    assert not device.learner.state.is_open
    device.receive(20, 10)
    device.run(2)


def test_the_rate_warms_up_once_and_stays(device):
    device.receive(0, 16)
    rates = []
    for number in range(3):
        device.learner.begin_round(None, RoundTask(number=number))
        rates += [report.learning_rate for report in device.learner.steps()]
        device.learner.finish_round()
    assert rates == pytest.approx([0, 0.03 * 8 / 256 / 2, *[0.03 * 8 / 256] * 10])


def test_new_scenes_show_as_drift(tmp_path):
    """A cat's pictures, more of them, then a pagoda's, as a trained encoder sees them."""
    recipe = replace(
        recipe_of("moco"), backbone=BackboneConfig(name="resnet_tiny"), views=ViewsConfig(global_size=48, num_locals=0)
    )
    config = replace(CONFIG, budget=Budget(new_images=60, steps=1), drift=replace(CONFIG.drift, fewest=20))
    device = Device(tmp_path, recipe, config)
    learner = device.learner
    trained = load_encoder("default").backbone.state_dict(prefix="online.backbone.")
    arrived = pack(learner.method.federated_state() | trained, learner.manifest)
    photos = PHOTOS()
    cat, pagoda = ([index for index in range(len(photos)) if photos.label(index) == kind] for kind in (1, 8))
    shares = []
    for indices in (cat[0::4], cat[1::4], cat[2::4], pagoda[:25]):
        for index in indices:
            cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), photos.read(index)[..., ::-1])
        shares.append(learner.begin_round(arrived, RoundTask(number=1)).drift)
        device.rest_of_round()
    assert shares[:2] == [None, None]
    assert shares[2] < 0.2
    assert shares[3] > 0.8


# What goes wrong


def test_training_that_diverges_is_told_and_the_last_good_weights_stay(tmp_path):
    device = Device(tmp_path, recipe_of("dino", name="sgd", base_lr=1e30, warmup_steps=0))
    device.receive(0, 12)
    arrived, _ = models(device)
    learner = device.learner
    learner.begin_round(arrived, RoundTask(number=1))
    with pytest.raises(TrainingDivergedError, match=r"no numbers|is nan|is inf"):
        device.rest_of_round()
    assert all(value.isfinite().all() for value in device.tensors().values() if value.is_floating_point())
    learner.abandon_round()
    assert device.arrivals.counts().new == 12
    plan = learner.begin_round(arrived, RoundTask(number=2))
    assert plan.mu == 0
    np.testing.assert_array_equal(pack(learner.method.federated_state(), learner.manifest), arrived)


def test_a_full_disk_leaves_the_last_state(device):
    device.receive(0, 12)
    device.learner.begin_round(None, RoundTask(number=1))
    before = device.tensors()
    steps = device.learner.steps()
    next(steps)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # writing fails as on a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            device.learner.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    steps.close()
    assert all(torch.equal(value, before[key]) for key, value in device.tensors().items())
    assert not [path for path in (device.root / "state").iterdir() if path.name.startswith(".")]
    device.lose_power()
    assert len(list(device.learner.steps())) == 4


def test_what_does_not_fit_is_refused_in_words(device):
    learner = device.learner
    for call in (lambda: next(learner.steps()), learner.finish_round):
        with pytest.raises(ValueError, match="no round is open"):
            call()
    for call in (learner.delta, learner.outcome):
        with pytest.raises(ValueError, match="no round was begun"):
            call()
    with pytest.raises(ValueError, match="float32"):
        learner.begin_round(np.zeros(3, dtype=np.float32), RoundTask(number=1))
    learner.begin_round(None, RoundTask(number=1))
    with pytest.raises(ValueError, match="a round is open"):
        learner.begin_round(None, RoundTask(number=2))
    device.recipe = replace(device.recipe, seed=6)
    with pytest.raises(UserError, match=r"another recipe \(there, here\): seed: 5, 6"):
        device.open()
    state = device.root / "state/learner.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        device.open()


def test_values_out_of_range_are_named():
    for values in ({"tau": 2.0}, {"save_every_steps": 0}, {"steps_per_epoch": 0}, {"refresh_images": -1}):
        with pytest.raises(ValueError, match=next(iter(values))):
            LearnerConfig(**values)


def test_the_manifest_unpacks_into_the_methods_own_names(device):
    learner = device.learner
    arrived, _ = models(device)
    shared = learner.method.federated_state()
    for name, value in unpack(arrived, learner.manifest).items():
        assert shared[name].shape == value.shape
