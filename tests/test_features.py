"""Features in files: the same as those made at once, whatever stops the making, and never those of another model."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import write_checkpoint, write_data
from numpy.typing import NDArray
from torch import Tensor

from lowssl_core.encoder import Encoder, load_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation import features as features_module
from lowssl_core.evaluation.features import STATE, VALUES, Features, FeatureStore
from lowssl_core.evaluation.subjects import open_subjects
from lowssl_core.interruption import StoppedError
from lowssl_core.sources import Source, open_source
from lowssl_core.sources.memory import read_pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.safetensors"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", 5)
    monkeypatch.setattr(features_module, "BATCH", 2)


def directly(encoder: Encoder, source: Source) -> Tensor:
    return encoder.embed([read_pixels(source, index) for index in range(len(source))])


def assert_alike(features: Features, expected: Tensor) -> None:
    """Equal up to what batches of another size do to sums."""
    torch.testing.assert_close(torch.from_numpy(features.values.copy()), expected, rtol=1e-3, atol=1e-3)


class Stopping(Encoder):
    """An encoder that breaks at its n-th batch, as a power cut would, or asks the process to stop."""

    def __init__(self, encoder: Encoder, *, at: int, signal_number: int | None = None) -> None:
        super().__init__(encoder.backbone, encoder.info)
        self.calls, self._at, self._signal = 0, at, signal_number

    def embed_inputs(self, inputs: NDArray[np.uint8]) -> Tensor:
        self.calls += 1
        if self.calls == self._at:
            if self._signal is None:
                raise RuntimeError("power cut")
            os.kill(os.getpid(), self._signal)
        return super().embed_inputs(inputs)


def test_features_in_files_are_those_made_at_once(data: str, encoder: Encoder) -> None:
    source = open_source(data)
    with FeatureStore() as store:
        features = store.features(encoder, source, origin=data, label="")
        assert_alike(features, directly(encoder, source))
        assert features.labels().tolist() == [source.label(i) for i in range(len(source))]
        assert list(features.names()) == [source.name(i) for i in range(len(source))]


@pytest.mark.parametrize("at", [1, 3, 4, 9])
def test_a_power_cut_loses_a_block_at_most_and_changes_nothing(
    data: str, encoder: Encoder, tmp_path: Path, at: int
) -> None:
    source = open_source(data)
    with FeatureStore(tmp_path) as store, pytest.raises(RuntimeError, match="power cut"):
        store.features(Stopping(encoder, at=at), source, origin=data, label="")
    # Rows that were written but not yet counted, cut anywhere.
    for values in tmp_path.glob(f"*/{VALUES}"):
        with values.open("ab") as file:
            file.write(b"\x7f" * 37)
    counting = Stopping(encoder, at=0)
    with FeatureStore(tmp_path) as store:
        features = store.features(counting, source, origin=data, label="")
    with FeatureStore() as store:
        assert np.array_equal(features.values, store.features(encoder, source, origin=data, label="").values)
    done_before = (at - 1) // 3 * 5  # a block of 5 is three batches of at most 2
    assert counting.calls == sum(-(-min(5, len(source) - first) // 2) for first in range(done_before, len(source), 5))


def test_a_signal_stops_between_blocks_and_the_next_call_goes_on(data: str, encoder: Encoder, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    source = open_source(data)
    with FeatureStore(tmp_path) as store:
        with pytest.raises(StoppedError) as stopped:
            store.features(Stopping(encoder, at=2, signal_number=signal.SIGTERM), source, origin=data, label="")
        assert stopped.value.status == 143
        (state,) = tmp_path.glob(f"*/{STATE}")
        assert json.loads(state.read_text())["next"] == 5
        features = store.features(encoder, source, origin=data, label="")
        assert_alike(features, directly(encoder, source))


def test_finished_features_are_found_again_and_those_of_other_models_and_data_are_not(
    data: str, encoder: Encoder, tmp_path: Path
) -> None:
    train, test = open_source(data), open_source(data, split="test")
    other = open_subjects("untrained:resnet_tiny")[0].embedder
    with FeatureStore(tmp_path) as store:
        first = store.features(encoder, train, origin=data, label="")
        again = Stopping(encoder, at=1)
        assert np.array_equal(store.features(again, train, origin=data, label="").values, first.values)
        assert again.calls == 0
        assert store.features(other, train, origin=data, label="").model != first.model
        store.features(encoder, test, origin=data, label="")
        store.features(encoder, train, origin=f"{data}-copy", label="")
    assert len(list(tmp_path.iterdir())) == 4


def test_unreadable_images_are_left_out_and_named(encoder: Encoder, tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    (root / "train" / "cat" / "00.png").write_bytes(b"")
    (root / "train" / "coffee" / "03.png").write_bytes(b"no image")
    source = open_source(str(root))
    good = [i for i in range(len(source)) if source.name(i) not in ("train/cat/00.png", "train/coffee/03.png")]
    with FeatureStore() as store:
        features = store.features(encoder, source, origin=str(root), label="")
        assert features.indices.tolist() == good
        assert features.labels().tolist() == [source.label(i) for i in good]
        expected = encoder.embed([read_pixels(source, index) for index in good])
        assert_alike(features, expected)
        assert set(features.set_aside) == {"train/cat/00.png", "train/coffee/03.png"}
        assert features.set_aside["train/cat/00.png"] == "empty file"


def test_what_cannot_be_used_is_one_line(encoder: Encoder, tmp_path: Path, data: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    with FeatureStore() as store, pytest.raises(UserError, match=r"not one image can be read: a.png \(empty file\)$"):
        store.features(encoder, open_source(str(tmp_path / "bad")), origin="", label="")
    (tmp_path / "file").write_text("")
    with FeatureStore(tmp_path / "file") as store, pytest.raises(UserError, match="not a folder that can be written"):
        store.features(encoder, open_source(data), origin="", label="")
    broken = load_encoder("default")
    with torch.no_grad():
        next(broken.backbone.parameters()).fill_(torch.nan)
    with FeatureStore() as store, pytest.raises(UserError, match="not all finite"):
        store.features(broken, open_source(data), origin="", label="")
