"""A federated round's model as a version of the encoder: exported, added with its lineage, judged, and promoted."""

import dataclasses
import fcntl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from lowssl_core.encoder import Encoder, EncoderInfo, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.export.description import Description
from lowssl_core.export.exporting import RefusedExport, export_encoder
from lowssl_core.protocol.manifest import manifest_of, unpack
from lowssl_core.recipe import Recipe, recipe_from_dict
from server.federation.history import Completed, History
from server.federation.operation import Operation
from server.federation.plan import Plan
from server.federation.versions import FACTS, round_facts, round_metrics, rounds_made
from server.registry.gate import GateSettings, judge_and_promote
from server.registry.registry import Registry
from server.registry.report import Check, GateReport
from server.registry.version import ENCODER, ONNX, UnknownVersionError, Version

# So many of the last rounds' models are kept for `lowssl federation version`; a model is up to 85 MB.
_KEPT_MODELS = 50
# Of a version whose model cannot be exported: the key of its facts that says why.
_REFUSAL = "refusal"
_NO_STEP: Callable[[str], None] = lambda _: None  # noqa: E731 - a default, said once


def make_version(
    registry: Registry,
    folder: Path,
    number: int,
    settings: GateSettings,
    *,
    who: str,
    on_step: Callable[[str], None] = _NO_STEP,
) -> Version:
    """Make a completed round a version, once, and let the gate judge it where the federation's plan says so.

    A model that cannot be exported, because it is not finite or its export is not what it is, is kept and refused.

    Args:
        registry: where to.
        folder: of the federation.
        number: of the round.
        settings: of the gate.
        who: does it.
        on_step: called with what is being done, a few words.

    Raises:
        UserError: no such round, its model is not kept, or what the gate and the registry raise; calling again goes on
            from there.
    """
    history, operation = History(folder), Operation.load(folder)
    if operation is None:
        raise UserError(f"{folder} holds no federation that lowssl federation start began")
    with _alone(folder):
        made = rounds_made(registry.versions(), history.run)
        version = made.get(number)
        history.prune(max(made, default=0) - _KEPT_MODELS)
        if version is None:
            completed = history.load(number)
            if completed is None or number == 0:
                raise UserError(_absent(number, history.newest()))
            parent = _parent(registry, made, number, operation)
            version = _add(registry, folder, completed, operation, parent, who, on_step)
        if version.state != "candidate":
            return version
        if refusal := version.facts.get(_REFUSAL):
            return _refuse(registry, version, str(refusal), who)
        if not operation.versions.promote:
            return version
        return judge_and_promote(registry, version.name, settings, who=who, why=_why(number), on_step=on_step)[0]


def _absent(number: int, newest: int) -> str:
    if 0 < number <= newest:
        return f"round {number} has no model any more, or it is broken; those of the last {_KEPT_MODELS} are kept"
    return f"there is no completed round {number}; the last one is {newest}"


def _add(
    registry: Registry,
    folder: Path,
    completed: Completed,
    operation: Operation,
    parent: str | None,
    who: str,
    on_step: Callable[[str], None],
) -> Version:
    history, plan = History(folder), Plan.from_json((folder / "plan.json").read_text())
    on_step("building the network")
    encoder = _encoder(completed, history, recipe_from_dict(plan.recipe), operation)
    record = completed.record
    with tempfile.TemporaryDirectory(prefix="lowssl-round-") as name:
        weights = Path(name) / "encoder.safetensors"
        encoder.info = save_encoder(weights, encoder.backbone, encoder.info)
        files, description, refusal = {ENCODER: weights}, _described(encoder.info), ""
        if not np.isfinite(completed.flat).all():
            refusal = "The model holds numbers that are not finite."
        else:
            try:
                report = export_encoder(encoder, Path(name) / "encoder.onnx", on_step=on_step)
            except UserError as error:
                missed = "; ".join(error.missed) if isinstance(error, RefusedExport) else str(error)
                refusal = f"Its export is not what it is: {missed}."
            else:
                files, description = files | {ONNX: report.path}, report.description
        facts = {"recipe": dict(plan.recipe), "source": operation.start.source, FACTS: round_facts(record, history.run)}
        return registry.add(
            kind="federated",
            description=description,
            files=files,
            parent=parent,
            metrics=round_metrics(record),
            facts=facts | ({_REFUSAL: refusal} if refusal else {}),
            who=who,
            why=_why(record.version),
        )


def _encoder(completed: Completed, history: History, recipe: Recipe, operation: Operation) -> Encoder:
    torch.manual_seed(recipe.seed)
    method = recipe.method.build(recipe.backbone, recipe.data.batch_size)
    if manifest_of(method) != history.manifest:
        raise UserError("the federation's recipe makes another network than the one that it began with")
    method.load_state_dict(unpack(completed.flat, history.manifest), strict=False)
    records = [record for record in history.records() if record.version <= completed.record.version]
    steps = sum(int(row["metrics"]["steps"]) for record in records for row in record.accepted)
    info = EncoderInfo(
        name=f"federation {history.run[:6]}, round {completed.record.version}",
        backbone=recipe.backbone.name,
        width=method.online.width,
        size=recipe.views.global_size,
        resize=operation.start.resize,
        method=recipe.method.name,
        recipe_hash=recipe.hash(),
        images_seen=operation.start.images_seen + steps * recipe.data.batch_size,
        data=f"images of {len({row['device'] for record in records for row in record.accepted})} devices",
        licence=operation.start.licence,
    )
    return Encoder(method.online.backbone, info)


def _described(info: EncoderInfo) -> Description:
    return Description(version="new", **dataclasses.asdict(info))


def _refuse(registry: Registry, version: Version, why: str, who: str) -> Version:
    check = Check(name="export", passed=False, value=None, bound=None, why=why)
    serving = registry.serving()
    against = None if serving is None else serving.name
    report = GateReport(version=version.name, against=against, probe="none", checks=[check])
    return registry.refuse(version.name, who=who, why=why, report=report)


def _parent(registry: Registry, made: dict[int, Version], number: int, operation: Operation) -> str | None:
    """The version that this round's was trained on from: the round's before it, or what the federation began with."""
    earlier = [other for other in made if other < number]
    if earlier:
        return made[max(earlier)].name
    if operation.start.parent is None:
        return None
    try:
        return registry.version(operation.start.parent).name
    except UnknownVersionError:  # the registry was made anew
        return None


def _why(number: int) -> str:
    return f"round {number} of the federation"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes versions of this federation: a round must not become two."""
    with (folder / "versions.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
