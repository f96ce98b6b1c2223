"""A federation's plan, read strictly from TOML: rounds, screening, aggregator, privacy, schedule and versions."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lowssl_core.errors import UserError
from server.aggregation import AGGREGATORS, AggregatorConfig
from server.aggregation.screening import ScreeningConfig
from server.federation.operation import ScheduleConfig, VersionsConfig
from server.federation.plan import Plan, PrivacyConfig, RoundsConfig

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """What a plan's file holds.

    Attributes:
        plan: its recipe is empty, for that is a file of its own.
        schedule: when rounds are ordered without a person.
        versions: which of them become versions.
    """

    plan: Plan = field(default_factory=Plan)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """The file's tables but for the aggregator's, whose keys depend on its name."""

    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)
    privacy: PrivacyConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    versions: VersionsConfig = field(default_factory=VersionsConfig)


def read_plan(path: Path) -> PlanFile:
    """Read a plan's file.

    Raises:
        UserError: no such file, or what `take_plan` raises.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"plan {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return take_plan(tree)
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from None


def take_plan(tree: Mapping[str, Any]) -> PlanFile:
    """A plan from its tables `rounds`, `screening`, `aggregator`, `privacy`, `schedule`, `versions`; any may be absent.

    Raises:
        UserError: an unknown key, a wrong type, or a value out of range, with the key's full path.
    """
    from lowssl_core.recipe import build_dataclass  # with torch, which the server itself does without

    rest = {key: table for key, table in tree.items() if key != "aggregator"}
    try:
        aggregator = _aggregator(tree.get("aggregator", {}), build_dataclass)
        sections = build_dataclass(_Sections, rest)
        plan = Plan(
            rounds=sections.rounds,
            screening=_screening(sections, rest.get("screening", {})),
            privacy=sections.privacy,
            aggregator=aggregator,
        )
    except ValueError as error:  # a UserError of the reader, or what Plan refuses
        tables = ", ".join(["aggregator", *(entry.name for entry in dataclasses.fields(_Sections))])
        said = _words(error).partition("; the recipe has ")
        raise UserError(said[0] + (f"; a plan has {tables}" if said[1] else "")) from None
    return PlanFile(plan=plan, schedule=sections.schedule, versions=sections.versions)


def _aggregator(table: Any, build: Callable[[type[AggregatorConfig], dict[str, Any]], Any]) -> AggregatorConfig:
    if not isinstance(table, dict):
        raise UserError(f"aggregator is {table!r}; it is a table")
    name = table.get("name", "fedavg")
    if not isinstance(name, str) or name not in AGGREGATORS:
        raise UserError(f"aggregator.name is {name!r}; it is one of {', '.join(AGGREGATORS)}")
    kind = AGGREGATORS[name]
    keys = [entry.name for entry in dataclasses.fields(kind)]
    for key in table:
        if key not in ("name", *keys):
            raise UserError(f"unknown key aggregator.{key}; {name} has {', '.join(keys) or 'none'}")
    try:
        made: AggregatorConfig = build(kind, {key: value for key, value in table.items() if key != "name"})
    except ValueError as error:
        said = _words(error)
        raise UserError(f"aggregator.{said}" if said.split()[0] in keys else f"aggregator: {said}") from None
    return made


def _screening(sections: _Sections, given: dict[str, Any]) -> ScreeningConfig:
    """The screening: with privacy, unless something else is given, without what privacy forbids."""
    if sections.privacy is None:
        return sections.screening
    forbidden = {"comparison": None, "max_staleness": 0}
    changes: dict[str, Any] = {name: value for name, value in forbidden.items() if name not in given}
    return dataclasses.replace(sections.screening, **changes)


def _words(error: ValueError) -> str:
    """What a reader of recipes says, without its own name."""
    return str(error).removeprefix("recipe: ")
