"""The replay memory of a device: images on disk under a cap in bytes, the redundant or the oldest leaving first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from client.database import Transaction, open_database
from client.redundancy import NearestPairs, normalized
from lowssl_core.images import BadImage, decode, read_size
from lowssl_core.sources import Image, Source
from lowssl_core.sources.memory import shrink

Embed = Callable[[Sequence[bytes]], NDArray[np.float32]]
"""Features (N, D) of N encoded images."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, staged INTEGER NOT NULL,
    data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS features (id INTEGER PRIMARY KEY, refreshed INTEGER NOT NULL, vector BLOB NOT NULL)
"""
# Small pages: an image of 2 kB would waste half of every other page of 4 kB.
_PAGE = 1024
_SMALLEST = 1_000_000
# Rows that one transaction writes at most, and their part of the cap in bytes: the journal, which counts too, may hold
# all that is overwritten. Twice that part, and as much as the rows' tables take, is kept free for it.
_ROWS_AT_ONCE = 16
_PART_AT_ONCE = 32
_TABLES = 64_000
_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The replay memory.

    Attributes:
        policy: which images leave a full memory: "minred" the most redundant, "fifo" the oldest.
        max_bytes: what it may take on disk, with its index, its features and images that wait to be learned.
    """

    policy: Literal["minred", "fifo"] = "minred"
    max_bytes: int = 256_000_000

    def __post_init__(self) -> None:
        if self.policy not in ("minred", "fifo"):
            raise ValueError(f'policy is {self.policy!r}; it is "minred" or "fifo"')
        if self.max_bytes < _SMALLEST:
            raise ValueError(f"max_bytes is {self.max_bytes}; it is a whole number from {_SMALLEST:,}")


class Staged(NamedTuple):
    """An image on its way into the memory: its content's key (hexadecimal), its bytes and its feature (D,)."""

    key: str
    data: bytes
    feature: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """What the memory holds: `images` to replay, `staged` new ones, and the `bytes` of its files."""

    images: int
    staged: int
    bytes: int


def compact(data: bytes, side: int) -> bytes:
    """An image as the memory keeps it: the shorter side at most `side` pixels, as JPEG of quality 90.

    For views of 32 px from photographs of 160 px that is a quarter of the bytes, so four times the images, at a cosine
    of .999 between the features before and after, where other images reach .87. WebP takes 30 % less and ten times as
    long to write and read. A smaller file that needs no shrinking is kept as it is: the quality lost to a second
    encoding buys nothing.

    Raises:
        BadImage: it cannot be used.
    """
    height, width = read_size(data)
    short = min(height, width)
    reduce = next(factor for factor in (8, 4, 2, 1) if factor == 1 or short >= factor * side)
    pixels = shrink(decode(data, reduce=reduce), side)
    done, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    if not done:
        raise BadImage("cannot be encoded")
    return data if short <= side and len(data) <= len(encoded) else encoded.tobytes()


class ReplayMemory:
    """Images that training goes back to, each once by its content, with a feature each.

    New images are staged, where nothing pushes them out, learned from, and then admitted: they join the others, and
    images leave until a quarter of the space is free for the next ones. The number of images that fit depends on their
    sizes; an image of 56 px takes some 4 kB with a feature of 256 numbers, one of 256 px some 30 kB.

    Each call leaves the database consistent at every moment: killed in the middle, staging has kept some of its
    images and admission goes on where it was.

    Args:
        path: the database's file; nothing else should be in its folder that counts against the cap.
        config: policy and cap.

    Attributes:
        largest_image: in bytes; larger ones are not to be staged.

    Raises:
        UserError: the file cannot be used.
    """

    def __init__(self, path: Path, config: MemoryConfig) -> None:
        self.path, self.config = path, config
        self._database = open_database(path, _SCHEMA, version=_VERSION, page_size=_PAGE)
        self.largest_image = config.max_bytes // _PART_AT_ONCE
        self._usable = config.max_bytes - 2 * self.largest_image - _TABLES
        if path.stat().st_size > self._usable:  # the cap was lowered
            self._drop(self._usable * 3 // 4)
            self._database.execute("VACUUM")
        self._database.execute(f"PRAGMA max_page_count = {self._usable // _PAGE}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def stats(self) -> MemoryStats:
        """How full it is."""
        counts = dict(self._database.execute("SELECT staged, count(*) FROM images GROUP BY staged"))
        names = (self.path, self.path.with_name(f"{self.path.name}-journal"))
        size = sum(path.stat().st_size for path in names if path.exists())
        return MemoryStats(images=counts.get(0, 0), staged=counts.get(1, 0), bytes=size)

    def holds(self, key: str) -> bool:
        """Whether an image is here, staged or admitted."""
        found = self._database.execute("SELECT 1 FROM images WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        return found is not None

    def keys(self, *, staged: bool) -> list[str]:
        """The keys of the images that are staged or, else, admitted, in the order in which they came."""
        rows = self._database.execute("SELECT key FROM images WHERE staged = ? ORDER BY id", (staged,))
        return [key.hex() for (key,) in rows]

    def read(self, key: str) -> bytes:
        """An image's bytes; BadImage if it has left."""
        found = self._database.execute("SELECT data FROM images WHERE key = ?", (bytes.fromhex(key),)).fetchone()
        if found is None:
            raise BadImage("no longer in the memory")
        return bytes(found[0])

    def features(self, *, staged: bool) -> NDArray[np.float32]:
        """(N, D) features of length 1, in the order of `keys`."""
        rows = self._database.execute(
            "SELECT vector FROM images JOIN features USING (id) WHERE staged = ? ORDER BY id", (staged,)
        )
        return _matrix([vector for (vector,) in rows])

    def stage(self, images: Sequence[Staged], now: int) -> int:
        """Take in new images, as long as there is room; returns how many of them are here now, from the first.

        Args:
            images: from `compact`; those that are here already are passed over.
            now: the step of the encoder that the features are from.

        Raises:
            ValueError: a feature that is not finite.
            OSError: the disk is full.
        """
        done = 0
        while done < len(images):
            with Transaction(self._database):
                started = self._used()
                for image in images[done : done + _ROWS_AT_ONCE]:
                    vector = normalized(image.feature[None])[0].astype(np.float16)
                    if not self.holds(image.key):
                        if self._used() + len(image.data) + vector.nbytes + 8 * _PAGE > self._usable:
                            return done
                        self._insert(image, vector, now)
                    done += 1
                    if self._used() - started > self.largest_image // 2:
                        break
        return done

    def admit(self) -> int:
        """Let the staged images join the others, and images leave until a quarter is free; returns how many left."""
        left = self._drop(self._usable * 3 // 4)
        staged = self._database.execute("SELECT id FROM images WHERE staged = 1").fetchall()
        for start in range(0, len(staged), _ROWS_AT_ONCE):
            with Transaction(self._database):
                self._database.executemany(
                    "UPDATE images SET staged = 0 WHERE id = ?", staged[start : start + _ROWS_AT_ONCE]
                )
        return left

    def refresh(self, embed: Embed, now: int, limit: int, *, width: int) -> int:
        """Take the features of at most `limit` images anew, the ones that waited longest first; returns how many.

        Args:
            embed: the encoder as it is now.
            now: its step, by which waiting is counted; features of this step are not taken again.
            limit: how many for this step, calls before included; features of another width than `width` (of another
                backbone) are all taken anew. Where they are wider and there is no room for that, images leave first.
            width: of the features.

        Raises:
            OSError: the disk is full.
        """
        ((growing,),) = self._database.execute("SELECT count(*) FROM features WHERE length(vector) < ?", (2 * width,))
        row = 2 * width + 2 * _PAGE  # what is left of the pages that it begins and ends in is taken too
        if growing:
            self._drop(self._usable - growing * row, spared=row)
        foreign, waiting = "length(vector) != ?", "refreshed < ?"
        ((strangers,),) = self._database.execute(f"SELECT count(*) FROM features WHERE {foreign}", (2 * width,))
        # Begun again after a kill, it goes on: with new limits, other features than without the kill would be anew.
        ((done,),) = self._database.execute(
            "SELECT count(*) FROM features JOIN images USING (id)"
            f" WHERE refreshed = ? AND staged = 0 AND NOT ({foreign})",
            (now, 2 * width),
        )
        rows = self._database.execute(
            f"SELECT id FROM features WHERE {foreign} OR {waiting} ORDER BY {foreign} DESC, refreshed, id LIMIT ?",
            (2 * width, now, 2 * width, max(limit - done, strangers, 0)),
        ).fetchall()
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = [row for (row,) in rows[start : start + _ROWS_AT_ONCE]]
            data = [
                self._database.execute("SELECT data FROM images WHERE id = ?", (row,)).fetchone()[0] for row in some
            ]
            vectors = normalized(embed(data)).astype(np.float16)
            with Transaction(self._database):
                self._database.executemany(
                    "UPDATE features SET vector = ?, refreshed = ? WHERE id = ?",
                    ((vector.tobytes(), now, row) for vector, row in zip(vectors, some, strict=True)),
                )
        return len(rows)

    def _used(self) -> int:
        """Bytes of the pages in use, whatever is in them, in the middle of a transaction too."""
        (pages,) = self._database.execute("PRAGMA page_count").fetchone()
        (free,) = self._database.execute("PRAGMA freelist_count").fetchone()
        return int(pages - free) * _PAGE

    def _insert(self, image: Staged, vector: NDArray[np.float16], now: int) -> None:
        row = self._database.execute(
            "INSERT INTO images (key, staged, data) VALUES (?, 1, ?)", (bytes.fromhex(image.key), image.data)
        ).lastrowid
        self._database.execute(
            "INSERT INTO features (id, refreshed, vector) VALUES (?, ?, ?)", (row, now, vector.tobytes())
        )

    def _delete(self, row: int) -> None:
        self._database.execute("DELETE FROM images WHERE id = ?", (row,))
        self._database.execute("DELETE FROM features WHERE id = ?", (row,))

    def _drop(self, capacity: int, *, spared: int = 0) -> int:
        """Let images leave until at most `capacity` bytes are in use, `spared` more for each; returns how many left."""
        left = 0
        if self._used() <= capacity:
            return left
        # Killed between two backbones, it has features that cannot be compared.
        ((widths,),) = self._database.execute("SELECT count(DISTINCT length(vector)) FROM features")
        order = self._by_redundancy() if self.config.policy == "minred" and widths == 1 else self._by_age()
        while self._used() > capacity:
            with Transaction(self._database):
                started = self._used()
                for row in islice(order, _ROWS_AT_ONCE):
                    self._delete(row)
                    left += 1
                    capacity += spared
                    if self._used() <= max(capacity, started - self.largest_image // 2):
                        break
        return left

    def _by_age(self) -> Iterator[int]:
        rows = self._database.execute("SELECT id FROM images ORDER BY id").fetchall()
        yield from (row for (row,) in rows)

    def _by_redundancy(self) -> Iterator[int]:
        """All images, the most redundant of those that are left each time."""
        rows = self._database.execute("SELECT id, vector FROM features ORDER BY id").fetchall()
        pairs = NearestPairs(_matrix([vector for _, vector in rows]))
        while len(pairs) >= 2:
            place = pairs.most_redundant()
            pairs.remove(place)
            yield rows[place][0]


class MemorySource(Source):
    """Images of a memory by their keys, as the core's loading takes them.

    Args:
        memory: where they are.
        keys: which, in this order.
    """

    split = None
    classes = None

    def __init__(self, memory: ReplayMemory, keys: Sequence[str]) -> None:
        self._memory, self._keys = memory, tuple(keys)
        self.description = f"{len(self._keys)} images of the replay memory"

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> Image:
        """Return the image's bytes; BadImage if it has left the memory."""
        return self._memory.read(self._keys[index])

    def name(self, index: int) -> str:
        """Return the image's key."""
        return self._keys[index]

    def label(self, index: int) -> None:
        """Return None: nothing is known of what images show."""


def _matrix(vectors: Sequence[bytes]) -> NDArray[np.float32]:
    """(N, D) from N stored vectors of the same width."""
    if not vectors:
        return np.zeros((0, 0), dtype=np.float32)
    return normalized(np.stack([np.frombuffer(vector, dtype=np.float16) for vector in vectors]).astype(np.float32))
