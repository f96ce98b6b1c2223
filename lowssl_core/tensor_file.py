"""Named tensors and facts about them in one safetensors file: written atomically, checked by a hash when read."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically

METADATA_KEY = "lowssl"


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """What a file holds.

    Attributes:
        format: which kind of file it is, with the kind's version.
        facts: what the file says of its tensors, as JSON.
        tensors: on the CPU, by name.
        hash: sha256 of the tensors, see `tensors_hash`.
    """

    format: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    hash: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, format: str, facts: Mapping[str, Any]) -> str:
    """Write a file atomically: after a crash it is the old one or the new one, whole; returns the tensors' hash."""
    # A copy of what is not contiguous (channels_last weights): the format knows one memory order only.
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    digest = tensors_hash(stored)
    metadata = {"format": format, "facts": facts, "hash": digest}
    data = safetensors.torch.save(stored, {METADATA_KEY: json.dumps(metadata)})
    write_atomically(path, lambda file: file.write(data))
    return digest


def read_tensors(path: Path) -> TensorFile:
    """Read a file and check its hash.

    Raises:
        UserError: no such file, a file of another kind, or a damaged one.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    if text is None:
        raise UserError(f"{path} was not written by LowSSL: its metadata have no entry {METADATA_KEY!r}")
    try:
        metadata = json.loads(text)
        kind, facts, digest = metadata["format"], metadata["facts"], metadata["hash"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged: its metadata cannot be read") from None
    if tensors_hash(tensors) != digest:
        raise UserError(f"{path} is damaged: its contents do not match the hash written with them")
    return TensorFile(format=kind, facts=facts, tensors=tensors, hash=digest)


def read_format(path: Path) -> str:
    """Which kind of file `path` is, from its metadata alone; "" for a file that was not written by LowSSL."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return str(json.loads((file.metadata() or {})[METADATA_KEY])["format"])
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, KeyError):
        return ""


def tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors, which are not read; the file is one of LowSSL's (`read_format`)."""
    with safetensors.safe_open(path, "pt") as file:
        return list(file.keys())


def write_sealed(path: Path, tensors: Mapping[str, Tensor], *, format: str, facts: Mapping[str, Any]) -> None:
    """Write a file as `write_tensors` does, with a hash of its facts too.

    The facts of a run that is gone on with, a step or a seed, decide as much as its tensors.
    """
    write_tensors(path, tensors, format=format, facts=dict(facts) | {"hash": _facts_hash(facts)})


def read_sealed(path: Path, *, format: str, kind: str) -> TensorFile:
    """Read what `write_sealed` wrote.

    Args:
        path: the file.
        format: which it must have.
        kind: what such a file is, in words.

    Raises:
        UserError: no such file, a file of another kind, or a damaged one.
    """
    file = read_tensors(path)
    if file.format != format:
        raise UserError(f"{path} is no {kind}: its format is {file.format!r}, not {format!r}")
    facts = {name: value for name, value in file.facts.items() if name != "hash"}
    if _facts_hash(facts) != file.facts.get("hash"):
        raise UserError(f"{path} is damaged: what it says of its tensors does not match the hash written with it")
    return dataclasses.replace(file, facts=facts)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of names; tensors are on the CPU and contiguous."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _facts_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
