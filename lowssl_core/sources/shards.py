"""Tar shards in WebDataset layout, read at random without unpacking.

WebDataset 1.0 reads shards as streams only (its indexed readers left the package), and a stream can neither be
shuffled exactly nor entered in the middle. So webdataset says which shards a pattern means and how a member's name
splits into key and extension; tarfile says once where each member's bytes lie.
"""

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from lowssl_core.errors import UserError
from lowssl_core.images import BadImage
from lowssl_core.sources.layout import IMAGE_EXTENSIONS, SPLITS, arrange, describe
from lowssl_core.sources.source import Image, Source


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file's bytes lie: the shard's number, the first byte and how many."""

    shard: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a shard, and its label as written in the shard, if any."""

    name: str
    image: Member
    label: int | str | None


def expand_shards(pattern: str) -> list[Path]:
    """Return the shards that a path, a brace list (a-{000..009}.tar), a glob or a folder of .tar files means.

    Raises UserError if there are none or one is missing.
    """
    from webdataset.shardlists import expand_urls

    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"shards {pattern!r} cannot be used: shards are read from local disks, not from addresses")
    paths: list[Path] = []
    for text in expand_urls(pattern):
        path = Path(text).expanduser()
        if path.is_dir():
            paths += sorted(path.glob("*.tar"))
        elif any(sign in text for sign in "*?["):
            paths += sorted(Path(match) for match in glob(str(path)))
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"shard {path} of {pattern!r} does not exist")
    if not paths:
        raise UserError(f"{pattern!r} matches no .tar file")
    return paths


def read_member(path: Path, member: Member) -> bytes:
    """Return a member's bytes; the file is opened anew, so that no handle is shared between processes."""
    with path.open("rb") as file:
        file.seek(member.start)
        return file.read(member.size)


def index_shard(path: Path, shard: int) -> list[Sample]:
    """Return the images of one shard in the order of their names; UserError if it is no tar or ends early.

    A sample's label is its .cls (text of a number or a name) or the `label` of its .json.
    """
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                key, extension = base_plus_ext(info.name.removeprefix("./"))
                if info.isreg() and key is not None and not info.name.startswith("__"):
                    samples.setdefault(key, {})[extension] = Member(shard, info.offset_data, info.size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen; a shard may hold many
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar shard: {error}") from error

    found = []
    for key in sorted(samples):
        label = read_label(path, samples[key])
        found += [Sample(f"{key}.{extension}", member, label) for extension, member in image_files(samples[key])]
    return found


def image_files(files: dict[str, Member]) -> list[tuple[str, Member]]:
    """Return those of a sample's files, by extension, that are its image: a.jpg, and not a.mask.png beside it."""
    images = [
        (extension, member)
        for extension, member in sorted(files.items())
        if "." + extension.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
    ]
    return [image for image in images if "." not in image[0]] or images


def read_label(path: Path, files: dict[str, Member]) -> int | str | None:
    """Return the label written beside an image, a number where it is one; None if there is none."""
    by_extension = {extension.lower(): member for extension, member in files.items()}
    label: object = None
    if "cls" in by_extension:
        label = read_member(path, by_extension["cls"]).decode(errors="replace").strip()
    elif "json" in by_extension:
        try:
            written = json.loads(read_member(path, by_extension["json"]))
        except ValueError:  # a label that cannot be read is no label; the image is still one
            return None
        label = written.get("label") if isinstance(written, dict) else None
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\d+", label) else label or None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def number_labels(labels: Sequence[int | str | None]) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
    """Turn written labels into numbers and class names; None unless every image has a label and two differ.

    Numbers stay as they are where they count classes from 0, so that shards of another split agree with them.
    """
    if any(label is None for label in labels) or len(set(labels)) < 2:
        return None
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels) and min(numbers) >= 0 and max(numbers) < 1_000_000:
        return tuple(numbers), tuple(str(number) for number in range(max(numbers) + 1))
    classes = tuple(sorted({str(label) for label in labels}))
    number_of = {name: number for number, name in enumerate(classes)}
    return tuple(number_of[str(label)] for label in labels), classes


def split_of_shard(path: Path) -> str | None:
    """Return the split that a shard's file name names, as in imagenet-train-0001.tar."""
    return next((word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLITS), None)


class ShardSource(Source):
    """The images of tar shards, in the order of their names.

    Splits are those in the shards' names, or SPLIT folders in the members' names; labels are those written beside the
    images, or else class folders in the members' names.
    """

    def __init__(self, pattern: str, *, split: str | None = None) -> None:
        self._shards = tuple(expand_shards(pattern))
        samples = [sample for i, path in enumerate(self._shards) for sample in index_shard(path, i)]
        if not samples:
            raise UserError(f"{pattern!r} holds no images (looked for {' '.join(sorted(IMAGE_EXTENSIONS))})")
        samples.sort(key=lambda sample: (sample.name, sample.image.shard))
        splits = [split_of_shard(path) for path in self._shards]
        prefixes = [f"{name}/" for name in splits] if all(splits) else [""] * len(splits)
        layout = arrange([prefixes[s.image.shard] + s.name for s in samples], split, repr(pattern))
        chosen = [samples[i] for i in layout.chosen]

        self._members = tuple(sample.image for sample in chosen)
        unique = len({sample.name for sample in chosen}) == len(chosen)
        self._names = tuple(
            sample.name if unique else f"{self._shards[sample.image.shard].name}/{sample.name}" for sample in chosen
        )
        written = number_labels([sample.label for sample in samples])
        if written is not None:
            labels, self.classes = written
            self._labels: tuple[int, ...] | None = tuple(labels[i] for i in layout.chosen)
        else:
            self._labels, self.classes = layout.labels, layout.classes
        self.split = layout.split
        self.description = describe(pattern, len(self._names), self.split, self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Image:
        """Return the member's bytes; BadImage if the shard is gone or shorter than it was."""
        member = self._members[index]
        try:
            data = read_member(self._shards[member.shard], member)
        except OSError as error:
            raise BadImage(f"cannot be read from the shard: {error.strerror}") from error
        if len(data) < member.size:
            raise BadImage("the shard ends before the image does")
        return data

    def name(self, index: int) -> str:
        """Return the name in the shard, after the shard's own name where two shards use one name."""
        return self._names[index]

    def label(self, index: int) -> int | None:
        """Return the label written beside the image or the number of its class folder; None without either."""
        return None if self._labels is None else self._labels[index]
