import hashlib
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from registry_data import Place, add, check_whole, write_file

from lowssl_core.errors import UserError
from server.registry.blobs import BlobStore, DamagedFileError, Lying, StoreUnavailableError
from server.registry.registry import open_registry
from server.registry.version import StoredFile


@pytest.fixture(params=["folder", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        root = f"memory://lowssl-{uuid.uuid4().hex}/files"
        yield root
        fsspec.filesystem("memory").rm(root.removeprefix("memory:/").removesuffix("/files"), recursive=True)
    else:
        folder = str(tmp_path / "the files")
        yield folder if request.param == "folder" else f"file://{folder}"


@pytest.fixture
def store(location: str, tmp_path: Path) -> BlobStore:
    opened = BlobStore(location, tmp_path / "cache")
    opened.put(write_file(tmp_path, b"always there", "always"))
    return opened


def stored_path(location: str, stored: StoredFile) -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(location)
    return filesystem, f"{root}/{stored.sha256[:2]}/{stored.sha256}"


def test_a_stored_file_comes_back_under_the_hash_of_its_content(store: BlobStore, tmp_path: Path) -> None:
    for content in (b"", b"short", bytes(range(256)) * 10_000):
        stored = store.put(write_file(tmp_path, content))
        assert stored == StoredFile(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        assert store.holds(stored)
        assert store.fetch(stored, of="it").read_bytes() == content
        assert store.put(write_file(tmp_path, content, "other name")) == stored


def test_damage_in_the_store_is_found_named_and_mended_by_storing_again(
    store: BlobStore, location: str, tmp_path: Path
) -> None:
    file = write_file(tmp_path, b"right content")
    stored = store.put(file)
    filesystem, path = stored_path(location, stored)
    filesystem.pipe_file(path, b"wrong content")
    with pytest.raises(DamagedFileError, match=rf"^v7 \(onnx\): its file {stored.sha256[:12]} is damaged in the store"):
        store.fetch(stored, of="v7 (onnx)")
    filesystem.pipe_file(path, b"cut")
    assert not store.holds(stored)
    filesystem.rm_file(path)
    assert not store.holds(stored)
    with pytest.raises(DamagedFileError, match="is missing in the store"):
        store.fetch(stored, of="v7 (onnx)")
    store.put(file)
    assert store.fetch(stored, of="v7 (onnx)").read_bytes() == b"right content"


def test_a_damaged_local_copy_of_a_remote_file_is_fetched_again(tmp_path: Path) -> None:
    store = BlobStore(f"memory://{uuid.uuid4().hex}", tmp_path / "cache")
    stored = store.put(write_file(tmp_path, b"right content"))
    copy = store.fetch(stored, of="it")
    assert copy.is_relative_to(tmp_path / "cache")
    copy.write_bytes(b"wrong content")
    assert store.fetch(stored, of="it").read_bytes() == b"right content"


def test_what_lies_in_the_store_is_listed_with_its_age_and_may_be_removed_twice(
    store: BlobStore, location: str, tmp_path: Path
) -> None:
    stored = store.put(write_file(tmp_path, b"content"))
    filesystem, path = stored_path(location, stored)
    filesystem.pipe_file(path.replace(stored.sha256, f".{stored.sha256}.half"), b"cont")
    filesystem.pipe_file(path.replace(stored.sha256, "README"), b"not ours")
    listing = store.listing()
    always = hashlib.sha256(b"always there").hexdigest()
    assert sorted((lying.sha256 or "", lying.bytes) for lying in listing) == sorted(
        [("", 4), (stored.sha256, 7), (always, 12)]
    )
    for lying in listing:
        assert abs(datetime.now(UTC) - lying.modified) < timedelta(minutes=1)
        store.remove(lying)
        store.remove(lying)
    assert store.listing() == []
    assert filesystem.exists(path.replace(stored.sha256, "README"))


def test_a_file_that_cannot_be_written_whole_leaves_nothing(
    store: BlobStore, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.listing()
    file = write_file(tmp_path, b"content of today")
    hashing = hashlib.file_digest

    def hash_then_change(source: Any, algorithm: str) -> Any:
        digest = hashing(source, algorithm)
        file.write_bytes(b"content of another day")
        return digest

    monkeypatch.setattr(hashlib, "file_digest", hash_then_change)
    with pytest.raises(UserError, match="changed while it was stored"):
        store.put(file)
    assert store.listing() == before


def test_a_registry_keeps_its_files_wherever_the_url_says(location: str, tmp_path: Path) -> None:
    registry = open_registry(Place(tmp_path / "data", files_url=location))
    for content in (b"1", b"2", b"3"):
        registry.promote(add(registry, tmp_path, content).name, who="a test")
        registry.fetch(registry.version("v1"))
    check_whole(registry)
    done = registry.prune(keep=0, who="a test")
    assert (done.versions, done.files, done.bytes) == (("v1",), 1, 1)
    cache = tmp_path / "data" / "cache"
    copies = {path.name for path in cache.iterdir()} if cache.is_dir() else set()
    assert hashlib.sha256(b"1").hexdigest() not in copies
    assert len(copies) == (2 if location.startswith("memory") else 0)
    check_whole(registry)
    registry.close()


@pytest.mark.parametrize("url", ["nonsense://bucket/files", "gopher://x"])
def test_a_store_of_an_unknown_kind_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^files_url {url}: .*"):
        BlobStore(url, tmp_path)


def test_a_store_that_cannot_be_reached_is_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match=r"^the store of files ftp://\.\.\.@127.0.0.1:1/files: ") as caught:
        BlobStore("ftp://me:secret@127.0.0.1:1/files", tmp_path)  # nothing listens there
    assert "\n" not in str(caught.value)


class Forgetful(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store whose every call fails in the way of its own library."""

    protocol = "forgetful"

    def __getattribute__(self, name: str) -> Any:
        if name in ("info", "find", "open", "makedirs", "rm_file"):
            raise RuntimeError("no credentials found\nand a long story")
        return super().__getattribute__(name)


def test_what_goes_wrong_within_a_store_is_one_line(tmp_path: Path) -> None:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    store = BlobStore("forgetful://bucket", tmp_path / "cache")
    stored = StoredFile(sha256="0" * 64, bytes=1)
    calls: list[Callable[[], object]] = [
        lambda: store.put(write_file(tmp_path, b"content")),
        lambda: store.holds(stored),
        lambda: store.fetch(stored, of="it"),
        store.listing,
        lambda: store.remove(Lying(path="x", sha256=None, bytes=1, modified=datetime.now(UTC))),
    ]
    for call in calls:
        with pytest.raises(
            StoreUnavailableError, match=r"^the store of files forgetful://bucket: no credentials found$"
        ):
            call()
