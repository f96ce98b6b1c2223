"""The two messages of a round, a task to a device and its update back: a strict JSON header and one flat payload."""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.codec import CODECS, Codec

MAX_HEADER = 2**18
"""Bytes of JSON in a message."""

_VERSION = 1
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PREFIX = 9  # magic, version, length of the header
_LARGEST = 2**53  # whole numbers that every JSON reader keeps exact
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the server asks of a device.

    Attributes:
        round: the federation's round.
        run: which of the server's runs it belongs to.
        version: of the model in the payload.
        manifest: hash of the manifest that both sides go by.
        recipe: the recipe, a tree of plain values.
        codec: how the update is to be encoded.
        share: of the values that top-k keeps.
        seconds: how long the round waits for the update, from the task's arrival; clocks of devices differ.
        proximal: mu of FedProx's mu/2 |w - w_t|^2, 0 for none.
        payload: a flat array by `codec.encode_flat`.
    """

    round: int
    run: str
    version: int
    manifest: str
    recipe: Mapping[str, Any]
    codec: Codec = "int8"
    share: float = 0.01
    seconds: float
    proximal: float = 0.0
    payload: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_counts(round=self.round, version=self.version)
        _check_texts(_NAME, run=self.run)
        _check_texts(_HASH, manifest=self.manifest)
        if self.codec not in CODECS:
            raise BadUpdate(f"codec is {self.codec!r}; it is one of {', '.join(CODECS)}")
        if not 0 < self.share <= 1:
            raise BadUpdate(f"share is {self.share}; it is above 0 up to 1")
        if self.seconds <= 0 or self.proximal < 0:
            raise BadUpdate(f"seconds is {self.seconds}, proximal {self.proximal}; they are above 0, and from 0")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a device tells about its training; it says nothing of single images.

    Attributes:
        steps: optimizer steps.
        seconds: they took.
        new_images: seen for the first time.
        replayed_images: taken from the memory.
        loss: mean of the steps; None without steps.
        drift: share of new images far from the memory; None before it can be told.
    """

    steps: int = 0
    seconds: float = 0.0
    new_images: int = 0
    replayed_images: int = 0
    loss: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        _check_counts(steps=self.steps, new_images=self.new_images, replayed_images=self.replayed_images)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a device answers.

    Attributes:
        round: of the task it answers.
        base_version: the model version that it trained from.
        device: the device's id; the receiver compares it with whom it is talking to.
        update_id: its own, the same when it is sent again.
        manifest: hash of the manifest.
        weight: images trained on. Screening refuses what is not above 0.
        metrics: about the training.
        payload: the delta of the parameters and the BatchNorm statistics, by `codec.encode_flat`.
    """

    round: int
    base_version: int
    device: str
    update_id: str
    manifest: str
    weight: float
    metrics: Metrics = field(default_factory=Metrics)
    payload: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_counts(round=self.round, base_version=self.base_version)
        _check_texts(_NAME, device=self.device, update_id=self.update_id)
        _check_texts(_HASH, manifest=self.manifest)


Message = TypeVar("Message", Task, Update)


def write_message(message: Task | Update) -> bytes:
    """A message as bytes: "LSSL", version, header's length (uint32, big-endian), JSON header, payload.

    Raises:
        BadUpdate: a value that cannot travel: not finite, or a header that is too long.
    """
    tree = {entry.name: getattr(message, entry.name) for entry in dataclasses.fields(message)}
    payload: bytes = tree.pop("payload")
    if isinstance(message, Update):
        tree["metrics"] = dataclasses.asdict(message.metrics)
    tree["kind"] = type(message).__name__.lower()
    try:
        header = json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise BadUpdate(f"message: cannot be written: {error}") from None
    if len(header) > MAX_HEADER:
        raise BadUpdate(f"message: a header of {len(header)} bytes; at most {MAX_HEADER}")
    return b"LSSL" + bytes([_VERSION]) + len(header).to_bytes(4, "big") + header + payload


def read_message(kind: type[Message], data: bytes, *, max_payload: int) -> Message:
    """Read a message strictly; what `data` claims about lengths is checked before anything is made of it.

    Args:
        kind: `Task` or `Update`.
        data: what arrived.
        max_payload: bytes that the payload may have, see `codec.largest_payload`.

    Raises:
        BadUpdate: anything else than such a message, with the reason.
    """
    if len(data) > _PREFIX + MAX_HEADER + max_payload:
        raise BadUpdate(f"message: {len(data)} bytes; at most {_PREFIX + MAX_HEADER + max_payload}")
    if data[:4] != b"LSSL" or len(data) < _PREFIX:
        raise BadUpdate("message: not one of LowSSL's")
    if data[4] != _VERSION:
        raise BadUpdate(f"message: of version {data[4]}; this side speaks {_VERSION}")
    end = _PREFIX + int.from_bytes(data[5:_PREFIX], "big")
    if end > len(data) or end > _PREFIX + MAX_HEADER:
        raise BadUpdate(f"message: cut, or a header above {MAX_HEADER} bytes")
    if len(data) - end > max_payload:
        raise BadUpdate(f"message: a payload of {len(data) - end} bytes; at most {max_payload}")
    tree = _read_json(data[_PREFIX:end])
    if tree.pop("kind", None) != kind.__name__.lower():
        raise BadUpdate(f"message: not {kind.__name__.lower()}")
    if "payload" in tree:
        raise BadUpdate("message: unknown key payload")
    return _build(kind, tree | {"payload": data[end:]})


def _read_json(data: bytes) -> dict[str, Any]:
    def refuse(text: str) -> float:
        raise BadUpdate(f"message: {text} is no number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise BadUpdate("message: a key comes twice")
        return dict(pairs)

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    try:
        tree = json.loads(data.decode(), parse_constant=refuse, parse_float=finite, object_pairs_hook=once)
    except BadUpdate:
        raise
    except (ValueError, RecursionError) as error:
        raise BadUpdate(f"message: its header is no JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise BadUpdate("message: its header is no table")
    return tree


def _build(kind: type[Kind], tree: Mapping[str, Any]) -> Kind:
    """A dataclass of plain values from a tree, strictly."""
    hints = typing.get_type_hints(kind)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(tree.keys() - fields.keys()):
        raise BadUpdate(f"message: unknown key {unknown[0][:80]!r}")
    for name, entry in fields.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise BadUpdate(f"message: {name} is missing")
    return kind(**{name: _value(hints[name], value, name) for name, value in tree.items()})


def _value(kind: Any, value: Any, name: str) -> object:
    """`value` as the type `kind`: true is no number, a whole number may stand for a float."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(typing.cast(type, kind), value)
    if isinstance(kind, types.UnionType):  # of something and None
        return None if value is None else _value(typing.get_args(kind)[0], value, name)
    if typing.get_origin(kind) is typing.Literal:
        kind = str  # which one is the dataclass's to check
    plain = dict if typing.get_origin(kind) is not None else kind
    if plain is float and type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if type(value) is not plain:
        raise BadUpdate(f"message: {name} is of the wrong type")
    return value


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not 0 <= value <= _LARGEST:
            raise BadUpdate(f"{name} is out of range; it is a whole number from 0")


def _check_texts(pattern: re.Pattern[str], **texts: str) -> None:
    for name, text in texts.items():
        if not pattern.fullmatch(text):
            raise BadUpdate(f"{name} is {text[:80]!r}; it matches {pattern.pattern}")
