"""Sources: one set of images gives the same names, labels and bytes from a folder, a zip and tar shards."""

import io
import json
import pickle
import tarfile
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.sources import Source, named, open_source
from lowssl_core.sources.memory import load_images, read_pixels, shrink_source

NAMES = [
    f"{split}/{kind}/{i:02d}.{extension}"
    for split, count in (("train", 3), ("val", 2), ("test", 1))
    for kind, extension in (("cat", "png"), ("dog", "PNG"))
    for i in range(count)
]


def encoded(seed: int, height: int = 24, width: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


FILES = {name: encoded(seed) for seed, name in enumerate(NAMES)}


def write_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def contents(source: Source) -> list[tuple[str, int | None, bytes]]:
    images = [source.read(i) for i in range(len(source))]
    return [(source.name(i), source.label(i), bytes(images[i])) for i in range(len(source))]


def test_folder_zip_and_tar_of_the_same_images_are_the_same_source(tmp_path: Path) -> None:
    shuffled = dict(sorted(FILES.items(), reverse=True))
    paths = [
        write_folder(tmp_path / "tree", FILES),
        write_zip(tmp_path / "a.zip", shuffled),
        write_zip(tmp_path / "stored.zip", FILES, zipfile.ZIP_STORED),
        write_tar(tmp_path / "a.tar", shuffled),
    ]
    for split in (None, "train", "val", "validation", "test"):
        sources = [open_source(path, split=split) for path in paths]
        folder = {None: "train", "validation": "val"}.get(split, split)
        expected = [(n, int("dog" in n), FILES[n]) for n in sorted(NAMES) if n.startswith(f"{folder}/")]
        for source in sources:
            assert contents(source) == expected
            assert source.classes == ("cat", "dog")
            assert source.split == {"val": "validation"}.get(str(folder), folder)


def test_split_may_be_written_behind_the_path(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    assert contents(open_source(f"{path}::test")) == contents(open_source(path, split="test"))
    assert contents(open_source(f"{path}::val")) == contents(open_source(path, split="validation"))
    with pytest.raises(UserError, match="ask for different splits"):
        open_source(f"{path}::val", split="test")
    with pytest.raises(UserError, match=r"'dev'.*unknown.*train, validation"):
        open_source(f"{path}::dev")


def test_images_in_any_folders_are_unlabelled_and_whole(tmp_path: Path) -> None:
    layouts = [
        ["a.jpg", "b.JPEG", "c.webp"],
        ["2020/a.jpg", "2020/b.jpg"],
        ["2020/a.jpg", "b.jpg"],
        ["2020/01/a.jpg", "2021/b.jpg"],
        ["train/a.jpg", "other/b/c.jpg"],
    ]
    for i, names in enumerate(layouts):
        source = open_source(write_folder(tmp_path / str(i), dict.fromkeys(names, b"x")))
        assert [source.name(j) for j in range(len(source))] == sorted(names)
        assert source.classes is None
        assert source.split is None
        assert all(source.label(j) is None for j in range(len(source)))


def test_class_folders_are_found_without_splits_and_under_a_shared_folder(tmp_path: Path) -> None:
    plain = open_source(write_folder(tmp_path / "plain", {"b/1.jpg": b"", "a/1.jpg": b"", "c/2.jpg": b""}))
    assert plain.classes == ("a", "b", "c")
    assert [plain.label(i) for i in range(3)] == [0, 1, 2]
    nested = {f"my data/{name}": data for name, data in FILES.items()}
    assert open_source(write_zip(tmp_path / "nested.zip", nested)).classes == ("cat", "dog")
    assert len(open_source(str(tmp_path / "nested.zip"), split="test")) == 2


def test_classes_are_numbered_over_all_splits(tmp_path: Path) -> None:
    files = {"train/a/1.jpg": b"", "train/b/1.jpg": b"", "test/b/2.jpg": b""}
    source = open_source(write_folder(tmp_path, files), split="test")
    assert source.label(0) == 1


def test_other_and_hidden_files_are_ignored(tmp_path: Path) -> None:
    noise = {
        "train/cat/notes.txt": b"",
        ".cache/x.jpg": b"",
        "train/cat/.y.jpg": b"",
    }
    folder = open_source(write_folder(tmp_path / "tree", FILES | noise))
    archive = open_source(write_zip(tmp_path / "a.zip", FILES | noise | {"__MACOSX/train/cat/z.jpg": b""}))
    assert contents(folder) == contents(archive)
    assert len(folder) == 6


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"1.jpg": b"one", "2.jpg": b"two"})
    write_folder(tmp_path / "data", {"cat/3.jpg": b"three", "cat/tabby/4.jpg": b"four"})
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "cat" / "tabby")
    source = open_source(str(tmp_path / "data"))
    assert [source.name(i) for i in range(len(source))] == ["cat/3.jpg", "cat/tabby/4.jpg", "dog/1.jpg", "dog/2.jpg"]


def test_shards_may_be_a_folder_a_glob_or_a_brace_list(tmp_path: Path) -> None:
    for shard in range(3):
        files = {f"{shard}{i:03d}.jpg": bytes([shard, i]) for i in range(4)}
        write_tar(tmp_path / f"s-{shard:03d}.tar", files)
    patterns = [str(tmp_path), f"{tmp_path}/s-*.tar", f"{tmp_path}/s-{{000..002}}.tar"]
    patterns.append("::".join(f"{tmp_path}/s-{shard:03d}.tar" for shard in range(3)))
    for pattern in patterns:
        source = open_source(pattern)
        assert [source.read(i) for i in range(12)] == [bytes([shard, i]) for shard in range(3) for i in range(4)]
        assert source.classes is None


def test_names_stay_unique_where_shards_repeat_them(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {"x.jpg": bytes([shard])})
    source = open_source(str(tmp_path))
    assert contents(source) == [("0.tar/x.jpg", None, b"\0"), ("1.tar/x.jpg", None, b"\1")]


def test_shards_named_after_splits_are_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "set-train-00.tar", {"a.jpg": b"a", "b.jpg": b"b"})
    write_tar(tmp_path / "set-val-00.tar", {"a.jpg": b"c"})
    assert len(open_source(str(tmp_path))) == 2
    assert open_source(str(tmp_path), split="val").read(0) == b"c"


def test_shard_labels_come_from_cls_or_json(tmp_path: Path) -> None:
    numbers = {"a.jpg": b"", "a.cls": b"2", "a.mask.png": b"", "b.v2.png": b"", "b.cls": b"0"}
    source = open_source(write_tar(tmp_path / "n.tar", numbers))
    assert contents(source) == [("a.jpg", 2, b""), ("b.v2.png", 0, b"")]
    assert source.classes == ("0", "1", "2")

    described = {f"{i}.json": json.dumps({"label": label}).encode() for i, label in enumerate(["oak", "elm", "oak"])}
    source = open_source(write_tar(tmp_path / "j.tar", described | {f"{i}.jpg": b"" for i in range(3)}))
    assert [source.label(i) for i in range(3)] == [1, 0, 1]
    assert source.classes == ("elm", "oak")

    partly = open_source(write_tar(tmp_path / "p.tar", {"a.jpg": b"", "a.cls": b"2", "b.jpg": b"", "b.json": b"[1"}))
    assert partly.classes is None
    assert partly.label(0) is None


def _read_first(source: Source) -> bytes:
    image = source.read(0)
    assert isinstance(image, bytes)
    return image


def test_sources_are_read_in_forked_and_pickled_copies(tmp_path: Path) -> None:
    paths = [write_zip(tmp_path / "a.zip", FILES), write_tar(tmp_path / "a.tar", FILES)]
    for path in (*paths, write_folder(tmp_path / "tree", FILES)):
        source = open_source(path)
        first = _read_first(source)
        assert _read_first(pickle.loads(pickle.dumps(source))) == first
        with get_context("fork").Pool(2) as pool:
            assert pool.map(_read_first, [source] * 4) == [first] * 4


def test_sizes_are_drawn_from_headers_and_skip_bad_images(tmp_path: Path) -> None:
    files = {f"{i}.png": encoded(i, height=20 + i, width=50) for i in range(5)} | {"bad.png": b"garbage"}
    source = open_source(write_folder(tmp_path, files))
    sizes = source.sizes(np.random.default_rng(0), 10)
    assert sorted(map(tuple, sizes.tolist())) == [(20 + i, 50) for i in range(5)]
    assert source.sizes(np.random.default_rng(0), 2).shape == (2, 2)


def test_shrunk_images_keep_order_names_labels_and_proportions(tmp_path: Path) -> None:
    files = {
        "a/1.png": encoded(0, 40, 80),
        "a/2.png": b"garbage",
        "b/3.png": encoded(1, 90, 60),
        "b/4.png": encoded(2, 9, 30),
    }
    source = open_source(write_folder(tmp_path, files))
    for threads in (1, 2):
        shrunk, set_aside = shrink_source(source, 20, threads=threads)
        assert list(set_aside) == ["a/2.png"]
        assert [(shrunk.name(i), shrunk.label(i)) for i in range(3)] == [("a/1.png", 0), ("b/3.png", 1), ("b/4.png", 1)]
        assert [np.asarray(shrunk.read(i)).shape for i in range(3)] == [(20, 40, 3), (30, 20, 3), (9, 30, 3)]
    mean = read_pixels(source, 0).reshape(20, 2, 40, 2, 3).mean((1, 3))  # whole factors: the mean of each square
    assert np.abs(np.asarray(shrunk.read(0)) - mean).max() <= 0.75


def test_loaded_images_go_with_their_labels(tmp_path: Path) -> None:
    files = {f"{'ab'[i % 2]}/{i}.png": encoded(i) for i in range(10)}
    source = open_source(write_folder(tmp_path, files | {"a/bad.png": b"garbage"}))
    images, labels, set_aside = load_images(source)
    assert labels == [0] * 5 + [1] * 5
    assert list(set_aside) == ["a/bad.png"]
    assert len(images) == 10

    again = [load_images(source, limit=4, seed=3) for _ in range(2)]
    assert again[0][1] == again[1][1]
    assert all(np.array_equal(x, y) for x, y in zip(again[0][0], again[1][0], strict=True))
    some, some_labels, _ = load_images(source, [6, 0], shrink_to=12)
    assert some_labels == [1, 0]
    assert [image.shape for image in some] == [(12, 16, 3)] * 2
    unlabelled = open_source(write_folder(tmp_path / "flat", {"x.png": encoded(0)}))
    assert load_images(unlabelled)[1] is None


def test_named_set_is_read_from_the_folder_of_named_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny:
        data = np.zeros((3, 32, 32, 3), np.uint8)
        targets = (1, 0, 1)
        classes = ("ship", "frog")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert (root, train, download) == (tmp_path, False, False)

    monkeypatch.setenv("LOWSSL_DATA", str(tmp_path))
    monkeypatch.setitem(named.DATA_SETS, "cifar10", Tiny)
    source = open_source("cifar10::test")
    assert [source.label(i) for i in range(3)] == [1, 0, 1]
    assert source.classes == ("ship", "frog")
    assert source.name(2) == "test/2"
    assert np.asarray(source.read(0)).shape == (32, 32, 3)


def test_named_set_without_a_network_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("LOWSSL_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=r"cifar10 is not in .*Network is unreachable.*LOWSSL_DATA") as caught:
        open_source("cifar10")
    assert "\n" not in str(caught.value)
    assert "downloading" in capsys.readouterr().err


def test_bad_image_names_a_file_that_went_away(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, {"a.png": encoded(0), "b.png": encoded(1)}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source.read(0)
