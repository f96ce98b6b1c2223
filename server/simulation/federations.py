"""What a simulated federation does, read strictly from TOML: rounds, screening, aggregator, and how devices learn."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowssl_core.errors import UserError
from lowssl_core.recipe import build_dataclass, read_tree, recipe_names
from server.aggregation import AGGREGATORS
from server.aggregation.screening import ScreeningConfig
from server.federation.plan import Plan, PrivacyConfig, RoundsConfig

PACKAGE = "server.simulation"
PREFIX = "federation."
# A simulated round is over when all devices have answered, however long that takes.
_NO_DEADLINE = 1e9


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """The file's tables but for the aggregator's, whose keys depend on its name."""

    rounds: RoundsConfig = field(default_factory=lambda: RoundsConfig(min_devices=1))
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)
    privacy: PrivacyConfig | None = None


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """A federation but for its recipe.

    Attributes:
        plan: of the server; its recipe is empty.
        learner: of the devices, a tree of plain values that the device side reads.
    """

    plan: Plan
    learner: Mapping[str, Any]

    def with_recipe(self, recipe: Mapping[str, Any]) -> Plan:
        """The whole plan."""
        return dataclasses.replace(self.plan, recipe=recipe)


def federation_names() -> list[str]:
    """The names of the federations that come with LowSSL."""
    return recipe_names(PACKAGE)


def separate(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is set of the recipe, and what of the federation, less its prefix."""
    ours = [each.strip().removeprefix(PREFIX) for each in overrides if each.strip().startswith(PREFIX)]
    return [each for each in overrides if not each.strip().startswith(PREFIX)], ours


def read_federation(name_or_path: str, overrides: Sequence[str]) -> FederationSettings:
    """Read a federation by its name or from a TOML file, with overrides as `load_recipe` takes them.

    Raises:
        UserError: no such file, an unknown key, a wrong type, or a value out of range.
    """
    try:
        tree = read_tree(name_or_path, overrides, package=PACKAGE)
        learner = _table(tree, "learner")
        aggregator = _table(tree, "aggregator")
        name = aggregator.pop("name", "fedavg")
        if name not in AGGREGATORS:
            raise UserError(f"recipe: aggregator.name is {name!r}; it is one of {', '.join(AGGREGATORS)}")
        rounds = _table(tree, "rounds")
        tree["rounds"] = {"min_devices": 1} | rounds | {"seconds": _NO_DEADLINE}
        sections = build_dataclass(_Sections, tree)
        plan = Plan(
            rounds=sections.rounds,
            screening=sections.screening,
            privacy=sections.privacy,
            aggregator=build_dataclass(AGGREGATORS[name], aggregator),
        )
    except ValueError as error:  # a UserError of the reader, or what Plan refuses
        said = (
            str(error)
            .removeprefix("recipe")
            .removeprefix(":")
            .replace("the recipe has", "it has aggregator, learner,", 1)
        )
        raise UserError(f"federation: {said.strip()}") from None
    return FederationSettings(plan=plan, learner=learner)


def _table(tree: dict[str, Any], name: str) -> dict[str, Any]:
    table = tree.pop(name, {})
    if not isinstance(table, dict):
        raise UserError(f"recipe: {name} is {table!r}; it is a table")
    return table
