"""Files by the hash of their content, in a folder or an object store: written whole, checked when read."""

import hashlib
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec  # type: ignore[import-untyped]

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from server.registry.version import StoredFile

CHUNK = 1 << 20


class DamagedFileError(UserError):
    """A stored file is missing or is not what was stored."""


class StoreUnavailableError(UserError):
    """The object store cannot be reached, or does not do what it is asked."""


@dataclass(frozen=True, kw_only=True)
class Lying:
    """A file as it lies in the store.

    Attributes:
        path: where, as the store calls it.
        sha256: the content that its name promises; None for what was being written.
        bytes: its length.
        modified: when it was written; aware, UTC.
    """

    path: str
    sha256: str | None
    bytes: int
    modified: datetime


class BlobStore:
    """Files named by their SHA-256 below a folder or the URL of an object store, two digits deep: `ab/abcd...`.

    A file is written under another name and moved to its own, so that one found under its name is whole, however the
    writing ended. What is stored again is written again, which also mends what was damaged.

    Args:
        location: a path, or a URL that fsspec knows: file://, s3://, memory:// ...
        cache: folder for local copies of what a remote store holds.

    Raises:
        UserError: a URL of a kind that is not installed or does not exist.
        StoreUnavailableError: a store that is reached for when it is named, and cannot be.
    """

    def __init__(self, location: str | Path, cache: Path) -> None:
        self._cache = cache
        self._name = re.sub(r"//[^/@]*@", "//...@", str(location))  # there may be a password in it
        try:
            # Listings must not be remembered: other processes write too.
            filesystem, root = fsspec.core.url_to_fs(str(location), use_listings_cache=False)
        except (ValueError, ImportError) as error:  # an unknown kind, or one that takes another package
            raise UserError(f"files_url {self._name}: {error}") from None
        except Exception as error:
            raise self._unavailable(error) from error
        self._fs: Any = filesystem
        self._root = root.rstrip("/")
        # A local folder needs no copies, and is written so that it survives the loss of power.
        self._folder = Path(root) if "file" in _protocols(filesystem) else None

    def put(self, file: Path) -> StoredFile:
        """Store a file's content.

        Raises:
            UserError: the file cannot be read, or changed meanwhile.
            StoreUnavailableError: the store cannot be reached or written.
        """
        with file.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
            stored = StoredFile(sha256=sha256, bytes=source.tell())
        with self._named_errors():
            if self._folder is not None:
                write_atomically(Path(self._path(sha256)), lambda target: _copy_checked(file, target, stored))
            else:
                self._upload(file, stored)
        return stored

    def holds(self, stored: StoredFile) -> bool:
        """Whether a file of this name and length is there; its content is not read."""
        with self._named_errors():
            try:
                return bool(self._fs.info(self._path(stored.sha256))["size"] == stored.bytes)
            except FileNotFoundError:
                return False

    def fetch(self, stored: StoredFile, *, of: str) -> Path:
        """A local file with the content, which was checked just now.

        Args:
            stored: which.
            of: what it is, for errors.

        Raises:
            DamagedFileError: it is not there, or its content is another.
            StoreUnavailableError: the store cannot be read.
        """
        if self._folder is None:
            path = self._cache / stored.sha256
            if not _is_whole(path, stored):
                self._download(stored, path, of)
            return path
        path = Path(self._path(stored.sha256))
        if not _is_whole(path, stored):
            raise DamagedFileError(self._damage(stored, of, "is damaged" if path.exists() else "is missing"))
        return path

    def listing(self) -> list[Lying]:
        """All that lies in the store, what a killed process was writing too; other people's files are passed over."""
        found = []
        with self._named_errors():
            # `find` of a folder that is not there is empty.
            entries = self._fs.find(self._root, detail=True)
            for path, info in entries.items():
                name = path.rsplit("/", 1)[-1]
                kind = _kind(name)
                if kind == "foreign":
                    continue
                try:
                    modified = _modified(self._fs, path, info)
                except FileNotFoundError:
                    continue  # moved or removed meanwhile
                sha256 = name if kind == "content" else None
                found.append(Lying(path=path, sha256=sha256, bytes=int(info["size"]), modified=modified))
        return found

    def remove(self, lying: Lying) -> None:
        """Remove a file; one that is gone already is no error."""
        with self._named_errors():
            try:
                self._fs.rm_file(lying.path)
            except FileNotFoundError:
                return

    def cached(self) -> list[Path]:
        """Local copies of what a remote store holds, named by their hashes, and downloads that never ended."""
        if not self._cache.is_dir():
            return []
        return [path for path in self._cache.iterdir() if _kind(path.name) != "foreign"]

    def _path(self, sha256: str) -> str:
        return f"{self._root}/{sha256[:2]}/{sha256}"

    def _upload(self, file: Path, stored: StoredFile) -> None:
        target = self._path(stored.sha256)
        folder = target.rsplit("/", 1)[0]
        temporary = f"{folder}/.{stored.sha256}.{uuid.uuid4().hex}"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            with self._fs.open(temporary, "wb") as upload:
                _copy_checked(file, upload, stored)
            self._fs.mv(temporary, target)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)
            raise

    def _download(self, stored: StoredFile, path: Path, of: str) -> None:
        with self._named_errors():
            try:
                with self._fs.open(self._path(stored.sha256), "rb") as source:
                    write_atomically(path, lambda target: shutil.copyfileobj(source, target, CHUNK))
            except FileNotFoundError:
                raise DamagedFileError(self._damage(stored, of, "is missing")) from None
        if not _is_whole(path, stored):
            path.unlink(missing_ok=True)
            raise DamagedFileError(self._damage(stored, of, "is damaged"))

    def _damage(self, stored: StoredFile, of: str, what: str) -> str:
        return f"{of}: its file {stored.sha256[:12]} {what} in the store ({self._path(stored.sha256)})"

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Stores have classes of their own for what goes wrong (no credentials, no network): one line of ours."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self._folder is not None:
                raise
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailableError:
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return StoreUnavailableError(f"the store of files {self._name}: {first}")


def _kind(name: str) -> Literal["content", "unfinished", "foreign"]:
    """What a file's name says of it: all that is written has another name until it is whole."""
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return "content"
    return "unfinished" if re.fullmatch(r"\.[0-9a-f]{64}\.\S+", name) else "foreign"


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _copy_checked(file: Path, target: BinaryIO, stored: StoredFile) -> None:
    """Copy a file, and see that it is still what was hashed: a name in the store is a promise."""
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != stored.sha256:
        raise UserError(f"{file} changed while it was stored")


def _is_whole(path: Path, stored: StoredFile) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
    except FileNotFoundError:
        return False


def _modified(filesystem: Any, path: str, info: dict[str, Any]) -> datetime:
    """When a file was written; some stores say so in the listing, others when asked."""
    found = info.get("LastModified") or info.get("last_modified")
    if not isinstance(found, datetime):
        found = filesystem.modified(path)
    assert isinstance(found, datetime)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
