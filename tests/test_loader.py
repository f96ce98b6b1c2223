"""The loader: what a batch holds depends on seed, epoch and index alone."""

import io
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowssl_core.errors import UserError
from lowssl_core.loader import DataConfig, Loader
from lowssl_core.sources import ArraySource, Source, open_source
from lowssl_core.views import PhotometricConfig, Views, ViewsConfig

VIEWS = ViewsConfig(global_size=16, num_locals=2)
LOCAL_SIZE = 10


def arrays(count: int = 22) -> ArraySource:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8) for i in range(count)]
    return ArraySource(images, [f"{i}.png" for i in range(count)], description="arrays")


def take(loader: Loader, steps: int, start_step: int = 0) -> list[torch.Tensor]:
    """Each batch as one (views, B, values) tensor of numbers."""
    return [flat(views) for views in islice(loader.batches(start_step), steps)]


def flat(views: Views) -> torch.Tensor:
    return torch.cat([view.flatten(1) for view in (*views.globals, *views.locals)], dim=1)


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def loader_of(source: Source | None = None, batch_size: int = 6, seed: int = 5, **kwargs: object) -> Loader:
    config = DataConfig(batch_size=batch_size)
    return Loader(source or arrays(), VIEWS, LOCAL_SIZE, config, seed=seed, **kwargs)  # type: ignore[arg-type]


def test_views_are_normalized_and_channels_last() -> None:
    loader = loader_of()
    views = next(loader.batches())
    assert [view.shape for view in views.globals] == [(6, 3, 16, 16)] * 2
    assert [view.shape for view in views.locals] == [(6, 3, 10, 10)] * 2
    for view in (*views.globals, *views.locals):
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.dtype == torch.float32
        assert -2.2 < view.min() < view.max() < 2.7
    assert loader.mode == "cpu"
    assert loader.set_aside == {}


def test_two_crops_without_locals() -> None:
    loader = Loader(arrays(), ViewsConfig(global_size=16, num_locals=0), 10, DataConfig(batch_size=4), seed=0)
    assert next(loader.batches()).locals == []


def test_workers_change_nothing() -> None:
    assert_same(take(loader_of(workers=0), 5), take(loader_of(workers=2), 5))


def test_the_device_makes_the_same_views_but_for_rounding() -> None:
    for workers in (0, 2):
        cpu, device = loader_of(mode="cpu"), loader_of(mode="device", workers=workers)
        for ours, theirs in zip(take(cpu, 4, 2), take(device, 4, 2), strict=True):
            difference = (ours - theirs).abs() * 0.226 * 255  # in steps of the 256 gray values
            assert difference.mean() < 1
            assert difference.quantile(0.99) < 8


def test_measuring_both_ways_gives_seconds_and_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    loader = loader_of()
    first = take(loader, 1)
    assert all(loader._seconds(batches) > 0 for batches in loader._batches.values())
    assert_same(first, take(loader, 1))


def test_what_workers_get_can_be_pickled_for_spawned_processes() -> None:
    for mode in ("cpu", "device"):
        loader = loader_of(mode=mode)
        draw = next(iter(loader._order(0)))
        batches = loader._batches[loader.mode]
        copy = pickle.loads(pickle.dumps(batches))
        assert torch.equal(flat(loader._finish(batches[draw].batch)), flat(loader._finish(copy[draw].batch)))


def test_slices_of_the_ranks_make_the_batch_of_one_rank() -> None:
    whole = take(loader_of(), 4)
    parts = [take(loader_of(rank=rank, world_size=3), 4) for rank in range(3)]
    assert_same(whole, [torch.cat(slices) for slices in zip(*parts, strict=True)])


def test_entering_at_a_step_continues_over_the_end_of_an_epoch() -> None:
    straight = take(loader_of(), 9)
    assert loader_of().steps_per_epoch == 3
    for start_step in (1, 2, 3, 7):
        assert_same(straight[start_step:], take(loader_of(), 9 - start_step, start_step))


def test_an_epoch_shows_each_image_at_most_once_and_epochs_differ() -> None:
    values = np.arange(22, dtype=np.uint8) * 11
    flat_colors = [np.full((20, 20, 3), value, np.uint8) for value in values]
    source = ArraySource(flat_colors, [str(i) for i in range(22)], description="flat colors")
    photometric = PhotometricConfig(
        jitter_probability=0, gray_probability=0, blur_probability=(0, 0, 0), solarize_probability=(0, 0, 0)
    )
    plain = ViewsConfig(global_size=8, num_locals=0, photometric=photometric)
    loader = Loader(source, plain, 8, DataConfig(batch_size=6), seed=5)
    reds = [views.globals[0][:, 0, 0, 0] for views in islice(loader.batches(), 6)]
    epochs = torch.stack(reds).view(2, 18)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 18
    assert not torch.equal(epochs[0], epochs[1])


def test_seeds_and_epochs_give_other_views() -> None:
    first, second = take(loader_of(seed=5), 1), take(loader_of(seed=6), 1)
    assert not torch.equal(first[0], second[0])
    only = ArraySource([np.asarray(arrays(1).read(0))], ["x"], description="one image")
    epochs = take(loader_of(only, batch_size=1), 2)
    assert not torch.equal(epochs[0], epochs[1])


def test_views_depend_on_the_index_and_not_on_the_place_in_the_batch() -> None:
    rows = torch.cat(take(loader_of(batch_size=2), 11))  # the same 22 images of epoch 0, in another grouping
    assert_same(list(torch.cat(take(loader_of(batch_size=11), 2))), list(rows))


def test_loading_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    state = np.random.get_state()[1].copy()
    take(loader_of(workers=1), 1)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(state, np.random.get_state()[1])


def test_shrunk_images_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = arrays()
    config = DataConfig(batch_size=6, shrink_to=12)
    loader = Loader(source, VIEWS, LOCAL_SIZE, config, seed=5)
    monkeypatch.setattr(source, "read", None)
    batches = take(loader, 4)
    assert min(np.asarray(loader.source.read(0)).shape[:2]) == 12
    assert not torch.equal(batches[0], take(loader_of(), 1)[0])


def test_unlabelled_files_train(tmp_path: Path) -> None:
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg")
        (tmp_path / f"{i}.jpg").write_bytes(buffer.getvalue())
    source = open_source(str(tmp_path))
    assert source.classes is None
    assert_same(take(loader_of(source, batch_size=4), 2), take(loader_of(source, batch_size=4, workers=1), 2))


def test_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 6 cannot be shared by 4 ranks"):
        loader_of(world_size=4)


def test_configuration_is_checked() -> None:
    for wrong in ({"batch_size": 0}, {"batch_size": 8, "shrink_to": 0}, {"batch_size": 8, "max_bad_fraction": 1.0}):
        with pytest.raises(ValueError, match="takes"):
            DataConfig(**wrong)  # type: ignore[arg-type]
