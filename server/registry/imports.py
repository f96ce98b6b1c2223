"""Bringing an encoder into the registry: a checkpoint, an encoder's file, a timm model, or an ONNX file."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lowssl_core.checkpoint import is_checkpoint, load_checkpoint
from lowssl_core.encoder import DEFAULT, Encoder, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.subjects import open_subject
from lowssl_core.export.adoption import adopt
from lowssl_core.export.description import Description
from lowssl_core.export.exporting import RefusedExport, export_encoder
from lowssl_core.files import write_atomically
from lowssl_core.tensor_file import tensors_hash
from server.registry.registry import Registry
from server.registry.version import ENCODER, ONNX, Version

ACCEPTED = (
    "a checkpoint of lowssl-pretrain, an encoder's file, an .onnx file, default (the encoder that comes with LowSSL), "
    "or timm:NAME (published weights)"
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import came to.

    Attributes:
        version: the new one or, if the registry had the same weights already, that one.
        is_new: which of both.
    """

    version: Version
    is_new: bool


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What is said of an encoder beside its source.

    Attributes:
        branch: of a checkpoint: whose weights; None: the student's.
        name: for people; None: the source's own.
        licence: of the weights; None: what the source says.
        parent: name of the version that it was trained on from.
        who: who adds it.
        why: in their words.
    """

    branch: Literal["student", "teacher"] | None = None
    name: str | None = None
    licence: str | None = None
    parent: str | None = None
    who: str
    why: str = ""


def import_encoder(
    registry: Registry, source: str, options: ImportOptions, *, on_step: Callable[[str], None] = lambda _: None
) -> Imported:
    """Add an encoder as a candidate: exported, compared with its network, and kept with its weights.

    What the registry has already, the same weights prepared and exported in the same way, is not added again, whatever
    its name and whatever became of it.

    Args:
        registry: where to.
        source: see `ACCEPTED`.
        options: what is said of it.
        on_step: called with what is being done, a few words.

    Raises:
        UserError: the source cannot be used or its export misses its bounds, there is no such parent, or the registry
            cannot be reached.
    """
    if options.parent is not None:
        registry.version(options.parent)
    with tempfile.TemporaryDirectory(prefix="lowssl-import-") as folder:
        if source != DEFAULT and Path(source).suffix.lower() == ".onnx":
            return _import_onnx(registry, Path(source), options, Path(folder), on_step)
        return _import_network(registry, source, options, Path(folder), on_step)


def _import_onnx(
    registry: Registry, source: Path, options: ImportOptions, folder: Path, on_step: Callable[[str], None]
) -> Imported:
    if options.branch is not None:
        raise UserError(f"--branch {options.branch} goes with a checkpoint; {source} is an ONNX file")
    on_step("checking the graph")
    model = adopt(source, name=options.name, licence=options.licence or "")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    description = Description.from_properties(properties, of=str(source))
    if (known := _known(registry, description)) is not None:
        return Imported(version=known, is_new=False)
    file, data = folder / "encoder.onnx", model.SerializeToString()
    write_atomically(file, lambda target: target.write(data))
    return _add(registry, description, {ONNX: file}, options, {"source": source.name})


def _import_network(
    registry: Registry, source: str, options: ImportOptions, folder: Path, on_step: Callable[[str], None]
) -> Imported:
    on_step("reading weights")
    encoder, facts = _open(source, options)
    info = encoder.info
    planned = Description(
        name=info.name or info.backbone,
        version="new",
        backbone=info.backbone,
        width=info.width,
        size=info.size,
        resize=info.resize,
        weights_hash=info.weights_hash,
    )
    if (known := _known(registry, planned)) is not None:
        return Imported(version=known, is_new=False)
    weights = folder / "encoder.safetensors"
    stored = save_encoder(weights, encoder.backbone, info)
    if stored.weights_hash != info.weights_hash:  # the source keeps them in fp16, which loses nothing a second time
        save_encoder(weights, encoder.backbone, info, half=True)
    try:
        report = export_encoder(encoder, folder / "encoder.onnx", on_step=on_step)
    except RefusedExport as error:
        raise UserError(f"{source}: its export is not what it is: {'; '.join(error.missed)}") from None
    return _add(registry, report.description, {ONNX: report.path, ENCODER: weights}, options, facts)


def _open(source: str, options: ImportOptions) -> tuple[Encoder, dict[str, Any]]:
    """The network, with a hash of its weights, and what is known of it beside its description."""
    if source.startswith("untrained:"):
        raise UserError(f"{source}: an untrained network has nothing to serve; give {ACCEPTED}")
    path = Path(source)
    has_branches = source != DEFAULT and path.is_file() and is_checkpoint(path)
    if options.branch is not None and not has_branches:
        raise UserError(f"--branch {options.branch} goes with a checkpoint of lowssl-pretrain; {source} is none")
    if source != DEFAULT and not source.startswith("timm:") and not path.is_file():
        raise UserError(f"there is no encoder {source!r}: give {ACCEPTED}")
    encoder = open_subject(source, branch=options.branch or "student").encoder
    info = encoder.info
    state = {name: value.cpu().contiguous() for name, value in encoder.backbone.state_dict().items()}
    encoder.info = replace(
        info,
        name=options.name or info.name,
        licence=info.licence if options.licence is None else options.licence,
        weights_hash=info.weights_hash or tensors_hash(state),
    )
    facts: dict[str, Any] = {"source": source if source.startswith("timm:") else path.name}
    if has_branches:
        checkpoint = load_checkpoint(path)
        facts |= {"recipe": checkpoint.recipe.as_dict(), "step": checkpoint.progress.step}
        facts |= {"total_steps": checkpoint.progress.total_steps}
    return encoder, facts


def _known(registry: Registry, description: Description) -> Version | None:
    """The oldest version with the same weights, prepared and exported in the same way."""
    if not description.weights_hash:
        return None
    versions = registry.versions()
    return next((one for one in versions if _identity(one.description) == _identity(description)), None)


def _identity(description: Description) -> tuple[str, int, int, str, str]:
    sizes = description.size, description.resize
    return (description.weights_hash, *sizes, description.precision, description.layout)


def _add(
    registry: Registry,
    description: Description,
    files: Mapping[str, Path],
    options: ImportOptions,
    facts: Mapping[str, object],
) -> Imported:
    version = registry.add(
        kind="pretrained" if description.method else "imported",
        description=description,
        files=files,
        parent=options.parent,
        facts=facts,
        who=options.who,
        why=options.why,
    )
    return Imported(version=version, is_new=True)
