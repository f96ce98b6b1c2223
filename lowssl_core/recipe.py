"""Recipes: everything that decides a run's result, read strictly from TOML."""

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from lowssl_core.backbones import BackboneConfig
from lowssl_core.compute import ComputeConfig
from lowssl_core.errors import UserError
from lowssl_core.loader import DataConfig
from lowssl_core.methods import METHODS, MethodConfig
from lowssl_core.monitor import MonitorConfig
from lowssl_core.optim import OptimConfig
from lowssl_core.views import ViewsConfig

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run but for where it happens.

    Attributes:
        method: MoCo, SwAV or DINO and its knobs; `method.name` chooses.
        backbone: what is trained.
        epochs: how often every image is seen.
        alpha: balance of global and local pairs (paper: .4); absent: the default formulation.
        seed: of the weights, the order of images and their views.
        views: multi-crop.
        data: batches.
        optim: optimizer and schedules.
        compute: precision and layout.
        monitor: how often quality is measured and a checkpoint written.
    """

    method: MethodConfig
    data: DataConfig
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    epochs: int = 200
    alpha: float | None = None
    seed: int = 0
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it is a whole number from 1")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it is a number from 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it is a whole number from 0 to {2**32 - 1}")

    def as_dict(self) -> dict[str, Any]:
        """The recipe as a tree of plain values, absent ones left out; `recipe_from_dict` reads it back."""
        tree = typing.cast(dict[str, Any], plain(self))
        tree["method"] = {"name": self.method.name, **tree["method"]}
        return tree

    def hash(self) -> str:
        """Twelve hexadecimal digits that tell this recipe from any other."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


class Described(Protocol):
    """A recipe of any kind: a dataclass that can be written as a tree of plain values."""

    def as_dict(self) -> dict[str, Any]:
        """The recipe as a tree of plain values, absent ones left out."""
        ...


def recipe_names(package: str = "lowssl_core") -> list[str]:
    """The names of the recipes that come with a package, the files of its folder `recipes`."""
    folder = resources.files(package) / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: a name of `recipe_names()`, or the path of a TOML file.
        overrides: "key.path=value", the value as TOML writes it (quotes may be left out), an empty one for absent.

    Raises:
        UserError: no such recipe, bad TOML, an unknown key, a wrong type, or a value out of range.
    """
    return recipe_from_dict(read_tree(name_or_path, overrides))


def read_tree(name_or_path: str, overrides: Sequence[str] = (), *, package: str = "lowssl_core") -> dict[str, Any]:
    """Read a recipe of any kind as the tree that is written there, overrides applied, its keys not yet checked.

    Args:
        name_or_path: a name of `recipe_names(package)`, or the path of a TOML file.
        overrides: as in `load_recipe`.
        package: whose recipes go by name.

    Raises:
        UserError: no such recipe, bad TOML, or an override that is none.
    """
    tree = _read_toml(name_or_path, package)
    for override in overrides:
        _override(tree, override)
    return tree


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from a tree of plain values, strictly.

    Raises:
        UserError: an unknown key, a wrong type, or a value out of range; the message has the key's full path.
    """
    return build_dataclass(Recipe, tree)


def build_dataclass(kind: type[Kind], tree: Mapping[str, Any]) -> Kind:
    """Build the dataclass `kind` from a tree of plain values, strictly; UserError as `recipe_from_dict` raises it."""
    return typing.cast(Kind, _build(kind, tree, ""))


def changed(config: Kind, overrides: Sequence[str]) -> Kind:
    """The dataclass `config` with overrides as in `load_recipe`; UserError as `recipe_from_dict` raises it."""
    tree = typing.cast(dict[str, Any], plain(config))
    for override in overrides:
        _override(tree, override)
    return build_dataclass(type(config), tree)


def plain(value: object) -> object:
    """A dataclass as a tree of plain values, absent ones left out, tuples as lists; other values as they are."""
    if dataclasses.is_dataclass(value):
        items = ((entry.name, getattr(value, entry.name)) for entry in dataclasses.fields(value))
        return {name: plain(item) for name, item in items if item is not None}
    return list(value) if isinstance(value, tuple) else value


def differences(one: Described, other: Described) -> list[str]:
    """The keys in which two recipes differ, as "key: value here, value there"."""
    here, there = flat_keys(one.as_dict()), flat_keys(other.as_dict())
    return [
        f"{key}: {here.get(key, 'absent')!r}, {there.get(key, 'absent')!r}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's tree (`Recipe.as_dict`) on one level: {"optim.base_lr": 0.1, ...}, in the tree's order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _read_toml(name_or_path: str, package: str) -> dict[str, Any]:
    names = recipe_names(package)
    if name_or_path in names:
        return tomllib.loads((resources.files(package) / "recipes" / f"{name_or_path}.toml").read_text())
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(f"recipe {name_or_path!r} is neither a TOML file nor one of {', '.join(names)}")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not TOML: {error}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not separator or not all((*parents, last)):
        raise UserError(f"--set {override}: wanted key=value, for example --set optim.base_lr=0.1")
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise UserError(f"--set {override}: {parent} is a value, not a table")
    if not text.strip():
        branch.pop(last, None)
        return
    try:
        branch[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        branch[last] = text.strip()  # a bare word is a string


def _build(kind: Any, tree: Mapping[str, Any], path: str) -> object:
    """An instance of the dataclass `kind` from a table; `path` is where it stands, with a dot at its end."""
    hints = typing.get_type_hints(kind)
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            raise UserError(f"recipe: unknown key {path}{key}; {path[:-1] or 'the recipe'} has {', '.join(fields)}")
    for name, entry in fields.items():
        if name not in tree and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise UserError(f"recipe: {path}{name} is missing")
    values = {key: _value(hints[key], value, f"{path}{key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except ValueError as error:
        names_a_key = str(error).split()[0] in fields
        raise UserError(f"recipe: {path if names_a_key or not path else f'{path[:-1]}: '}{error}") from None


def _value(kind: Any, value: Any, path: str) -> object:
    """`value` as the type `kind`, or an error that names `path` and what is accepted."""
    if kind == MethodConfig:
        return _method(value, path)
    for accepted in _alternatives(kind):
        if dataclasses.is_dataclass(accepted) and isinstance(value, Mapping):
            return _build(accepted, value, f"{path}.")
        matches, converted = _match(accepted, value)
        if matches:
            return converted
    raise UserError(f"recipe: {path} is {value!r}; it is {_describe(kind)}")


def _match(kind: Any, value: Any) -> tuple[bool, object]:
    """Whether `value` is of the type `kind`, and the value as that type."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind), value
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            return False, None
        matched = [_match(each, item) for each, item in zip(kinds, value, strict=True)]
        return all(matches for matches, _ in matched), tuple(item for _, item in matched)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number, float(value) if is_number else None
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return kind is not types.NoneType and isinstance(value, kind), value


def _method(value: Any, path: str) -> object:
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"recipe: {path}.name is {name!r}; it is one of {', '.join(METHODS)}")
    return _build(METHODS[name], {key: item for key, item in value.items() if key != "name"}, f"{path}.")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    # A union with a Literal is typing's own, not the `|` of types.
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _describe(kind: Any) -> str:
    if len(alternatives := _alternatives(kind)) > 1:
        return " or ".join(_describe(each) for each in alternatives if each is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        return "a table"
    if typing.get_origin(kind) is Literal:
        names = [f'"{value}"' for value in typing.get_args(kind)]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))
