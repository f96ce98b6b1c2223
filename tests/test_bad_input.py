"""Bad input: single images are set aside and replaced, everything else is one clear line."""

import io
import struct
import tarfile
import zipfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowssl_core.errors import UserError
from lowssl_core.loader import DataConfig, Loader
from lowssl_core.sources import open_source
from lowssl_core.views import ViewsConfig

VIEWS = ViewsConfig(global_size=16, num_locals=1)


def encoded(seed: int, kind: str = "jpeg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BAD = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"this is no image at all", "unreadable"),
    "cut.jpg": (encoded(0)[:-600], "truncated"),
    "cut.png": (encoded(0, "png")[:-3000], "truncated"),
    "no_pixels.png": (png_header(40, 40), ""),
    "zero.png": (png_header(0, 0), ""),
    "tiny.png": (png_header(2, 2), "tiny"),
    "huge.png": (png_header(60_000, 60_000), "huge"),
}


def write(root: Path, bad: list[str], good: int = 40) -> str:
    for i in range(good):
        (root / f"good{i:02d}.jpg").write_bytes(encoded(i))
    for name in bad:
        (root / name).write_bytes(BAD[name][0])
    return str(root)


def make_loader(path: str, batch_size: int = 8, **kwargs: object) -> Loader:
    max_bad_fraction, shrink_to = kwargs.pop("max_bad_fraction", 0.5), kwargs.pop("shrink_to", None)
    config = DataConfig(batch_size=batch_size, max_bad_fraction=max_bad_fraction, shrink_to=shrink_to)  # type: ignore[arg-type]
    return Loader(open_source(path), VIEWS, 10, config, seed=0, **kwargs)  # type: ignore[arg-type]


def epoch_of(loader: Loader) -> list[torch.Tensor]:
    return [views.globals[0] for views in islice(loader.batches(), loader.steps_per_epoch)]


def assert_each_reason(set_aside: dict[str, str]) -> None:
    assert set(set_aside) == set(BAD)
    for name, reason in set_aside.items():
        assert BAD[name][1] in reason
        assert reason


def test_each_kind_of_bad_image_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    loader = make_loader(write(tmp_path, list(BAD)))
    batches = epoch_of(loader)
    assert [len(batch) for batch in batches] == [8] * 6
    assert_each_reason(loader.set_aside)


def test_replacements_are_the_same_for_every_number_of_workers(tmp_path: Path) -> None:
    path = write(tmp_path, list(BAD))
    alone, helped = make_loader(path), make_loader(path, workers=2)
    for left, right in zip(epoch_of(alone), epoch_of(helped), strict=True):
        assert torch.equal(left, right)
    assert helped.set_aside == alone.set_aside
    rows = [row.numpy().tobytes() for batch in epoch_of(alone) for row in batch]
    assert len(set(rows)) == len(rows)  # a replacement is no copy of its image's other views


def test_each_kind_of_bad_image_is_found_while_shrinking(tmp_path: Path) -> None:
    loader = make_loader(write(tmp_path, list(BAD)), shrink_to=20)
    assert_each_reason(loader.set_aside)
    assert len(loader.source) == 40
    assert loader.steps_per_epoch == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run_with_the_list(tmp_path: Path, workers: int) -> None:
    for i in range(14):
        (tmp_path / f"bad{i:02d}.jpg").write_bytes(b"")
    loader = make_loader(write(tmp_path, []), max_bad_fraction=0.2, batch_size=27, workers=workers)
    with pytest.raises(UserError, match=r"1\d of 54 images cannot be used, more than max_bad_fraction = 0.2") as caught:
        epoch_of(loader)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("(empty file)") == 10
    assert message.endswith(f"and {len(loader.set_aside) - 10} more")


def test_one_in_a_hundred_bad_images_is_accepted_and_two_are_not(tmp_path: Path) -> None:
    path = write(tmp_path, ["empty.jpg"], good=99)
    assert make_loader(path, max_bad_fraction=0.01, shrink_to=16).set_aside == {"empty.jpg": "empty file"}
    with pytest.raises(UserError, match=r"2 of 101 images .*: cut\.jpg \(.*\), empty\.jpg \(empty file\)$"):
        make_loader(write(tmp_path, ["cut.jpg"], good=0), max_bad_fraction=0.01, shrink_to=16)


def test_only_bad_images_end_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, list(BAD), good=0)
    with pytest.raises(UserError, match=r"of 8 images cannot be used"):
        epoch_of(make_loader(path, max_bad_fraction=0.9, batch_size=2))
    with pytest.raises(UserError, match=r"8 of 8 images cannot be used"):
        make_loader(path, batch_size=2, shrink_to=16)
    (tmp_path / "cut.jpg").unlink()  # the only one with a sound header
    with pytest.raises(UserError, match="not one of the 7 images can be read"):
        open_source(path).sizes(np.random.default_rng(0), 3)


def test_fewer_images_than_a_batch_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, ["empty.jpg"], good=7)
    with pytest.raises(UserError, match=r"7 of them usable.*fewer than one batch, batch_size = 8"):
        make_loader(path, shrink_to=16)
    with pytest.raises(UserError, match=r"8 images.*fewer than one batch, batch_size = 9"):
        make_loader(path, batch_size=9)


def test_images_that_cannot_be_held_in_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.__getitem__)
    with pytest.raises(UserError, match=r"shrunk to 30 px the images take about .* choose a smaller shrink_to"):
        make_loader(write(tmp_path, []), shrink_to=30)


def test_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(8):
            archive.writestr(f"{i}.jpg", encoded(i))
    data = bytearray(path.read_bytes())
    data[data.find(b"3.jpg") + 400] ^= 255
    path.write_bytes(data)
    loader = make_loader(str(path), batch_size=8)
    epoch_of(loader)
    assert list(loader.set_aside) == ["3.jpg"]
    assert "Bad CRC-32" in loader.set_aside["3.jpg"]


def test_paths_that_hold_nothing_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "file.xyz").write_text("x")
    (tmp_path / "broken.zip").write_text("x")
    (tmp_path / "broken.tar").write_text("x" * 2000)
    with zipfile.ZipFile(tmp_path / "hollow.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as shard:
        shard.add(tmp_path / "notes" / "a.txt", "a.jpg")
    with tarfile.open(tmp_path / "short.tar", "w") as shard:
        shard.add(tmp_path / "broken.tar", "a.jpg")
    (tmp_path / "short.tar").write_bytes((tmp_path / "short.tar").read_bytes()[:1500])
    expected = {
        "": "empty.*a folder of images, a .zip, .tar shards.*photos, cifar10",
        f"{tmp_path}/missing": "there is no data at .*missing.*a folder of images",
        "cifar11": "there is no data at 'cifar11'.*cifar10",
        f"{tmp_path}/empty": r"holds no images \(looked for .*\.jpg",
        f"{tmp_path}/notes": "holds no images",
        f"{tmp_path}/file.xyz": "cannot be used as data",
        f"{tmp_path}/broken.zip": "cannot be read as a zip",
        f"{tmp_path}/hollow.zip": "holds no images",
        f"{tmp_path}/broken.tar": "cannot be read as an uncompressed tar",
        f"{tmp_path}/packed.tar": "cannot be read as an uncompressed tar",
        f"{tmp_path}/short.tar": "cannot be read as an uncompressed tar",
        f"{tmp_path}/none-{{0..3}}.tar": "shard .*none-0.tar .* does not exist",
        f"{tmp_path}/none-*.tar": "matches no .tar file",
        "https://example.org/a-{0..3}.tar": "local disks",
        "photos::validation": "photos has no split 'validation': it holds train, test",
        "cifar10::val": "cifar10 has no split 'val'",
        f"{tmp_path}/broken.zip::half": "split 'half'.*unknown.*train, validation",
    }
    for path, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, [], good=2)
    with pytest.raises(UserError, match="has no split 'test': it has no train, validation or test folders"):
        open_source(path, split="test")
    for split in ("val", "test"):
        (tmp_path / "tree" / split).mkdir(parents=True)
        (tmp_path / "tree" / split / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds the splits test, validation and no train"):
        open_source(str(tmp_path / "tree"))
    with pytest.raises(UserError, match="has no split 'train': it holds test, validation"):
        open_source(str(tmp_path / "tree"), split="train")
