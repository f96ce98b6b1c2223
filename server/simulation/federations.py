"""What a simulated federation does, read strictly from TOML: rounds, screening, aggregator, and how devices learn."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowssl_core.errors import UserError
from lowssl_core.recipe import read_tree, recipe_names
from server.federation.plan import Plan
from server.federation.plans import take_plan

PACKAGE = "server.simulation"
PREFIX = "federation."
# A plan's tables but for those that only a server works by, and the devices'.
_TABLES = ("rounds", "screening", "aggregator", "privacy", "learner")
# A simulated round is over when all devices have answered, however long that takes.
_NO_DEADLINE = 1e9


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
        for key in tree:
            if key not in _TABLES:
                raise UserError(f"unknown key {key}; it has {', '.join(_TABLES)}")
        rounds, learner = _table(tree, "rounds"), _table(tree, "learner")
        rounds = {"min_devices": 1} | rounds | {"seconds": _NO_DEADLINE}
        plan = take_plan({key: table for key, table in tree.items() if key != "learner"} | {"rounds": rounds}).plan
    except UserError as error:
        raise UserError(f"federation: {str(error).removeprefix('recipe').removeprefix(':').strip()}") from None
    return FederationSettings(plan=plan, learner=learner)


def _table(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = tree.get(name, {})
    if not isinstance(table, dict):
        raise UserError(f"{name} is {table!r}; it is a table")
    return table
