"""The manifest: which parts of a method's state travel, and where each stands in the flat array that carries them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lowssl_core.protocol import BadUpdate

if TYPE_CHECKING:  # devices' shims and the server do without torch
    from torch import Tensor

    from lowssl_core.methods import Method

FloatArray = NDArray[np.float32]
Kind = Literal["parameter", "batchnorm_mean", "batchnorm_variance", "buffer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES = ("float32", "float64", "float16", "bfloat16")
# Far above any backbone here; what a manifest announces is allocated.
MAX_VALUES = 2**31
# SwAV's prototypes are directions: what is left of their lengths after averaging means nothing.
_UNIT_ROWS = ("prototypes.",)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the state.

    Attributes:
        name: as in the method's `state_dict`.
        shape: of the tensor.
        dtype: of the tensor; all travel as float32.
        offset: where it begins in the flat array.
        kind: parameters travel as deltas, everything else as values.
        unit_rows: whether its rows have length 1 and get it again after averaging.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    kind: Kind
    unit_rows: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def place(self) -> slice:
        """Where it stands in the flat array."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Manifest:
    """The entries in the order of the flat array: all parameters, all BatchNorm means, all variances, other buffers.

    So each kind is one slice, and means and variances of one layer stand at the same place of theirs.

    Raises:
        ValueError: entries that do not follow each other so.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        offset = 0
        for entry in self.entries:
            if entry.kind not in KINDS or entry.dtype not in DTYPES:
                raise ValueError(f"{entry.name}: a {entry.dtype} {entry.kind} cannot travel")
            if entry.offset != offset or any(side < 0 for side in entry.shape):
                raise ValueError(f"{entry.name}: stands at {entry.offset}; {offset} is where the last entry ends")
            if entry.unit_rows and (entry.kind != "parameter" or len(entry.shape) != 2):
                raise ValueError(f"{entry.name}: only a matrix of parameters has unit rows")
            offset += entry.size
        if offset > MAX_VALUES:
            raise ValueError(f"{offset} values; at most {MAX_VALUES} travel")
        order = [KINDS.index(entry.kind) for entry in self.entries]
        if order != sorted(order):
            raise ValueError(f"entries are not in the order {', '.join(KINDS)}")
        if len({entry.name for entry in self.entries}) < len(self.entries):
            raise ValueError("two entries have one name")
        means, variances = (
            [(entry.name.rpartition(".")[0], entry.shape) for entry in self.entries if entry.kind == kind]
            for kind in ("batchnorm_mean", "batchnorm_variance")
        )
        if means != variances:
            raise ValueError("BatchNorm means and variances are not of the same layers")

    @cached_property
    def size(self) -> int:
        """Number of values in the flat array."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def trained_size(self) -> int:
        """Number of values that are parameters; they are the first, and travel as deltas."""
        return sum(entry.size for entry in self.entries if entry.kind == "parameter")

    @property
    def means(self) -> slice:
        """Where the running means are."""
        return self._kind("batchnorm_mean")

    @property
    def variances(self) -> slice:
        """Where the running variances are, in the order of the means."""
        return self._kind("batchnorm_variance")

    @property
    def buffers(self) -> slice:
        """Where other buffers of floats are."""
        return self._kind("buffer")

    @cached_property
    def hash(self) -> str:
        """sha256 of the JSON, 64 hexadecimal digits: two sides with one hash understand each other's arrays."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _kind(self, kind: Kind) -> slice:
        last = KINDS.index(kind)
        start = sum(entry.size for entry in self.entries if KINDS.index(entry.kind) < last)
        return slice(start, start + sum(entry.size for entry in self.entries if entry.kind == kind))

    def to_json(self) -> str:
        """The entries as one line of JSON."""
        return json.dumps([asdict(entry) for entry in self.entries], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote, strictly.

        Raises:
            BadUpdate: not JSON, an unknown key, a wrong type, or entries that do not follow each other.
        """
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadUpdate(f"manifest: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise BadUpdate("manifest: not a list of entries")
        entries = tuple(_entry(row) for row in rows)
        try:
            return cls(entries)
        except ValueError as error:
            raise BadUpdate(f"manifest: {error}") from None


def _entry(row: Any) -> Entry:
    kinds = {"name": str, "shape": list, "dtype": str, "offset": int, "kind": str, "unit_rows": bool}
    if not isinstance(row, dict) or row.keys() != kinds.keys():
        raise BadUpdate(f"manifest: an entry has {', '.join(kinds)}, and nothing else")
    # Exact types: True is an int to isinstance.
    wrong = [key for key, kind in kinds.items() if type(row[key]) is not kind]
    if wrong or any(type(side) is not int for side in row["shape"]):
        raise BadUpdate(f"manifest: {(wrong or ['shape'])[0]} is of the wrong type")
    return Entry(**row | {"shape": tuple(row["shape"])})


def manifest_of(method: "Method") -> Manifest:
    """The manifest of what a method shares: trained parameters, BatchNorm statistics, other buffers of floats.

    What the method declares private, frozen parameters, `num_batches_tracked` and other integers stay where they are.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    shared = method.federated_state()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in method.named_parameters()} - trained
    kinds: dict[str, Kind] = {}
    for prefix, module in method.named_modules():
        if isinstance(module, _BatchNorm):
            kinds |= {f"{prefix}.running_mean": "batchnorm_mean", f"{prefix}.running_var": "batchnorm_variance"}
    kinds |= dict.fromkeys(trained, "parameter")
    named = [
        (kinds.get(name, "buffer"), name, value)
        for name, value in shared.items()
        if name not in frozen and value.is_floating_point()
    ]
    entries, offset = [], 0
    for kind, name, value in sorted(named, key=lambda item: KINDS.index(item[0])):  # stable: the state's own order
        entry = Entry(
            name=name,
            shape=tuple(value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            offset=offset,
            kind=kind,
            unit_rows=kind == "parameter" and name.startswith(_UNIT_ROWS),
        )
        entries.append(entry)
        offset += entry.size
    return Manifest(tuple(entries))


def pack(state: Mapping[str, "Tensor"], manifest: Manifest) -> FloatArray:
    """The manifest's part of a state as one flat float32 array (size,); further entries of the state are left out.

    Raises:
        ValueError: the state lacks an entry, or has it with another shape.
    """
    flat = np.empty(manifest.size, dtype=np.float32)
    for entry in manifest.entries:
        if entry.name not in state or tuple(state[entry.name].shape) != entry.shape:
            raise ValueError(f"the state has no {entry.name} of shape {entry.shape}")
        flat[entry.place] = state[entry.name].detach().float().cpu().numpy().reshape(-1)
    return flat


def unpack(flat: FloatArray, manifest: Manifest) -> dict[str, "Tensor"]:
    """The tensors that a flat array (size,) holds, copied, in their own shapes and dtypes, by name."""
    import torch

    check_flat(flat, manifest)
    return {
        entry.name: torch.from_numpy(flat[entry.place].reshape(entry.shape).copy()).to(getattr(torch, entry.dtype))
        for entry in manifest.entries
    }


def delta_of(local: FloatArray, base: FloatArray, manifest: Manifest) -> FloatArray:
    """What a device sends: local - base for the parameters, local's own values for the statistics; all (size,)."""
    check_flat(local, manifest)
    check_flat(base, manifest)
    delta = local.copy()
    delta[: manifest.trained_size] -= base[: manifest.trained_size]
    return delta


def check_flat(flat: NDArray[Any], manifest: Manifest) -> None:
    """Refuse an array that is not the manifest's.

    Raises:
        ValueError: not float32, or not of shape (size,).
    """
    if flat.dtype != np.float32 or flat.shape != (manifest.size,):
        raise ValueError(f"a {flat.dtype} array of shape {flat.shape}; the manifest's is float32 ({manifest.size},)")
