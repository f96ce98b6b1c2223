"""Several sources as one: their images, one source after the other."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from lowssl_core.errors import UserError
from lowssl_core.sources.opening import open_source
from lowssl_core.sources.source import Image, Source


class JoinedSource(Source):
    """The images of several sources, in their order; without labels, for classes of different sets do not compare."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._ends = list(accumulate(len(source) for source in self._sources))
        self.description = " + ".join(source.description for source in self._sources)
        self.split = None
        self.classes = None

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Image:
        """Return image `index`, as its own source does."""
        source, place = self._find(index)
        return source.read(place)

    def name(self, index: int) -> str:
        """Return the image's name, behind the number of its source, from 1."""
        source, place = self._find(index)
        return f"{self._sources.index(source) + 1}:{source.name(place)}"

    def label(self, index: int) -> None:
        """Return None: there are no labels."""
        return

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


def open_sources(paths: Sequence[str]) -> Source:
    """Open one path, or several as one source without labels (see `open_source`).

    Raises:
        UserError: none is given, or one cannot be opened.
    """
    if not paths:
        raise UserError("no data path is given")
    sources = [open_source(path) for path in paths]
    return sources[0] if len(sources) == 1 else JoinedSource(sources)
