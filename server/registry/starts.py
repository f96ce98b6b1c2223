"""What a federation begins with: the flat model of a checkpoint, of an encoder's weights, or of an untrained recipe."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowssl_core.checkpoint import Checkpoint, is_checkpoint, load_checkpoint, tensors_below
from lowssl_core.encoder import DEFAULT, Encoder, load_encoder
from lowssl_core.errors import UserError
from lowssl_core.methods import Method
from lowssl_core.preprocess import Preprocess
from lowssl_core.protocol.manifest import FloatArray, Manifest, manifest_of, pack
from lowssl_core.recipe import Recipe, recipe_from_dict
from server.federation.operation import Start
from server.registry.registry import Registry
from server.registry.version import ENCODER, UnknownVersionError, version_number

ACCEPTED = (
    "a version (v1), a checkpoint of lowssl-pretrain, an encoder's file, or default (the encoder that comes along)"
)


@dataclass(frozen=True)
class Begun:
    """A model to begin with.

    Attributes:
        recipe: that devices train by.
        manifest: of the model.
        flat: (size,) the model.
        start: where it came from.
    """

    recipe: Recipe
    manifest: Manifest
    flat: FloatArray = field(repr=False)
    start: Start


def open_start(registry: Registry, source: str | None, recipe: Recipe | None) -> Begun:
    """Build the model that a federation begins with; the same one each time.

    A checkpoint is gone on from whole, its head included, where its method is the recipe's; of everything else the
    encoder's weights are taken, and the head begins untrained.

    Args:
        registry: of versions.
        source: see `ACCEPTED`; None: untrained.
        recipe: that devices train by; None: the source's own.

    Raises:
        UserError: no such source, none that has weights, no recipe, or one of another network.
    """
    if source is None:
        if recipe is None:
            raise UserError(f"give --recipe RECIPE, --from SOURCE or both; SOURCE is {ACCEPTED}")
        return _begun(recipe, _built(recipe), Start(resize=_resize(recipe)))
    is_file = source != DEFAULT and Path(source).is_file()
    if is_file and is_checkpoint(Path(source)):
        return _from_checkpoint(source, load_checkpoint(Path(source)), recipe)
    if is_file or source == DEFAULT:
        return _from_encoder(Path(source).name, load_encoder(source), recipe, parent=None)
    try:
        version_number(source)
    except UnknownVersionError:
        raise UserError(f"there is no {source!r} to begin with: give {ACCEPTED}") from None
    version = registry.version(source)
    if ENCODER not in version.files:
        raise UserError(f"{source} has no weights to train on from, only {', '.join(version.files) or 'a history'}")
    if recipe is None and isinstance(tree := version.facts.get("recipe"), dict):
        recipe = recipe_from_dict(tree)
    return _from_encoder(source, load_encoder(registry.fetch(version, ENCODER)), recipe, parent=source)


def _from_checkpoint(source: str, checkpoint: Checkpoint, recipe: Recipe | None) -> Begun:
    recipe, own = recipe or checkpoint.recipe, checkpoint.recipe
    _check_backbone(source, own.backbone.name, recipe)
    method = _built(recipe)
    state = tensors_below(checkpoint.tensors, "method.")
    name = Path(source).name
    shapes = {key: value.shape for key, value in method.state_dict().items()}
    if own.method.name == recipe.method.name and {key: value.shape for key, value in state.items()} == shapes:
        method.load_state_dict(state)
    else:
        method.online.backbone.load_state_dict(tensors_below(state, "online.backbone."))
        name += ", its encoder alone"
    seen = checkpoint.progress.step * own.data.batch_size
    start = Start(source=name, resize=_resize(recipe), images_seen=seen)
    return _begun(recipe, method, start)


def _from_encoder(source: str, encoder: Encoder, recipe: Recipe | None, *, parent: str | None) -> Begun:
    info = encoder.info
    if recipe is None:
        raise UserError(f"{source} has no recipe to train on by: give --recipe RECIPE")
    _check_backbone(source, info.backbone, recipe)
    method = _built(recipe)
    method.online.backbone.load_state_dict(encoder.backbone.state_dict())
    resize = info.resize if info.size == recipe.views.global_size else _resize(recipe)
    start = Start(source=source, parent=parent, resize=resize, licence=info.licence, images_seen=info.images_seen)
    return _begun(recipe, method, start)


def _built(recipe: Recipe) -> Method:
    torch.manual_seed(recipe.seed)
    return recipe.method.build(recipe.backbone, recipe.data.batch_size)


def _begun(recipe: Recipe, method: Method, start: Start) -> Begun:
    manifest = manifest_of(method)
    return Begun(recipe, manifest, pack(method.federated_state(), manifest), start)


def _check_backbone(source: str, backbone: str, recipe: Recipe) -> None:
    if backbone != recipe.backbone.name:
        raise UserError(f"{source} is a {backbone}, and the recipe trains a {recipe.backbone.name}")


def _resize(recipe: Recipe) -> int:
    return Preprocess(size=recipe.views.global_size).resize
