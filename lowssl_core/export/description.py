"""What an exported encoder says of itself: an ONNX file's metadata, written and read strictly, without torch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from lowssl_core import __version__
from lowssl_core.errors import UserError
from lowssl_core.preprocess import Preprocess

FORMAT = "lowssl-onnx-1"

# Names of the graph's input and outputs.
INPUT = "images"
FEATURES = "features"
EMBEDDING = "embedding"

Precision = Literal["fp32", "fp16", "int8"]
Layout = Literal["nhwc", "nchw"]
Branch = Literal["student", "teacher", "recalibrated"]

# What `Description.agreement` may hold.
AGREEMENT = ("cosine", "centered_cosine", "neighbors")

# As in lowssl_core.views, which imports torch; a test holds the two together.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# How evaluation-style input is made. A file that asks for anything else cannot be served by this package.
_RULES = {"crop": "center", "interpolation": "bicubic"}
_AGREEMENT_PREFIX = "agreement."

_COUNTS = frozenset({"width", "size", "resize", "images_seen"})
_CHOICES = {"branch": get_args(Branch), "precision": get_args(Precision), "layout": get_args(Layout)}
_TEXTS = frozenset(
    {"name", "version", "backbone", "method", "recipe_hash", "weights_hash", "branch", "data", "licence"}
    | {"precision", "layout"}
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an exported encoder is: all of `EncoderInfo`, and how it was exported.

    Attributes:
        name: for people.
        version: for people and for answers; in a registry "v1", "v2" ...
        backbone: which network.
        width: how long features are.
        size: side of the input in pixels.
        resize: short side of an image before the centre square is cut (`Preprocess`).
        method: which method trained it, "" for none.
        recipe_hash: which recipe, "" for none.
        weights_hash: of the weights it was made from, "" where that is not known.
        branch: the trained weights, their moving average, or the trained weights with BatchNorm re-estimated.
        images_seen: how many images training took, each epoch anew.
        data: what it was trained on.
        licence: of the weights, "" where nothing was said.
        precision: of the weights and the arithmetic.
        layout: of the input: (B, S, S, 3) or (B, 3, S, S).
        parity: how far the outputs of fp32's graph lie from torch's: the largest difference over the largest number,
            on real images, when the file was made. None: not measured.
        agreement: with fp32's features on real images, some of `AGREEMENT`; empty for fp32.
    """

    name: str
    version: str
    backbone: str
    width: int
    size: int
    resize: int
    method: str = ""
    recipe_hash: str = ""
    weights_hash: str = ""
    branch: Branch = "student"
    images_seen: int = 0
    data: str = ""
    licence: str = ""
    precision: Precision = "fp32"
    layout: Layout = "nhwc"
    parity: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _TEXTS | _COUNTS:
            value = getattr(self, name)
            if type(value) is not (int if name in _COUNTS else str):
                raise ValueError(f"{name} is {value!r}, of the wrong type")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(accepted)}")
        if not self.name or not self.version:
            raise ValueError("name and version must not be empty")
        if self.width < 1 or self.images_seen < 0:
            raise ValueError(f"width is {self.width} and images_seen {self.images_seen}; expected from 1 and from 0")
        Preprocess(size=self.size, resize=self.resize)
        if unknown := sorted(set(self.agreement) - set(AGREEMENT)):
            raise ValueError(f"agreement has {', '.join(unknown)}; it may have {', '.join(AGREEMENT)}")
        figures = {"parity": self.parity, **{f"agreement in {key}": value for key, value in self.agreement.items()}}
        for name, figure in figures.items():
            if figure is not None and not (isinstance(figure, float) and math.isfinite(figure)):
                raise ValueError(f"{name} is {figure!r}, not a finite number")

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the graph's input."""
        return Preprocess(size=self.size, resize=self.resize)

    @property
    def input_shape(self) -> tuple[str, int, int, int]:
        """The graph's input: "batch" and three numbers."""
        sides = (self.size, self.size)
        return ("batch", *sides, 3) if self.layout == "nhwc" else ("batch", 3, *sides)

    def to_properties(self) -> dict[str, str]:
        """The file's metadata: what is here, and beside it what never varies."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in ("parity", "agreement")
        }
        figures = {_AGREEMENT_PREFIX + key: value for key, value in self.agreement.items()}
        if self.parity is not None:
            figures["parity"] = self.parity
        return {
            "format": FORMAT,
            **{name: str(value) for name, value in values.items()},
            **{name: repr(float(value)) for name, value in figures.items()},
            **_RULES,
            "preprocessing": self._in_words(),
            "mean": ", ".join(map(str, MEAN)),
            "std": ", ".join(map(str, STD)),
            "lowssl": __version__,
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], *, of: str) -> Self:
        """Read a file's metadata; what other programs added to it is passed over.

        Args:
            properties: as `to_properties` made them.
            of: the file's name for errors.

        Raises:
            UserError: another format, or something missing or wrong.
        """
        if properties.get("format") != FORMAT:
            found = properties.get("format")
            raise UserError(
                f"{of} was not exported by LowSSL: its metadata have "
                + (f"format {found!r}, not {FORMAT!r}" if found else "no entry 'format'")
            )
        for name, accepted in _RULES.items():
            if properties.get(name) != accepted:
                raise UserError(f"{of}: its {name} is {properties.get(name)!r}; images are prepared with {accepted!r}")
        try:
            return cls(**_values(properties))
        except ValueError as error:
            raise UserError(f"{of}: its metadata cannot be used: {error}") from None

    def _in_words(self) -> str:
        return (
            f"Shrink or enlarge the RGB image so that its short side is {self.resize} pixels, bicubic with "
            f"anti-aliasing, and cut the centre square of {self.size} pixels; the graph does the rest."
        )


def _values(properties: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a `Description` from text; ValueError for what is missing or no number."""
    missing = sorted((_TEXTS | _COUNTS) - set(properties))
    if missing:
        raise ValueError(f"no entry {', '.join(map(repr, missing))}")
    values: dict[str, Any] = {name: properties[name] for name in _TEXTS}
    for name in _COUNTS:
        values[name] = _number(name, properties[name], int)
    if "parity" in properties:
        values["parity"] = _number("parity", properties["parity"], float)
    values["agreement"] = {
        key.removeprefix(_AGREEMENT_PREFIX): _number(key, text, float)
        for key, text in properties.items()
        if key.startswith(_AGREEMENT_PREFIX)
    }
    return values


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, not a number") from None
