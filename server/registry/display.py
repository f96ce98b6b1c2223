"""Versions, histories, reports and differences as tables for the terminal."""

import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.registry.comparison import Comparison
from server.registry.report import Check, GateReport
from server.registry.version import Event, Version

PLAIN_WIDTH = 120
NOTHING = "-"
STYLES = {"serving": "bold green", "refused": "red", "retired": "dim", "candidate": ""}
# Figures of the gate that `list` has room for.
LISTED = ("rankme", "retrieval", "knn")


def console() -> Console:
    """Where tables go: as wide as the terminal, or 120 columns where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def versions_table(versions: Sequence[Version]) -> Table:
    """A row for each version, the newest first."""
    table = _table("version", "state", "name", "network", "input", "from", "added")
    table.columns[2].no_wrap = False  # where the terminal is narrow, names give way
    shown = [name for name in LISTED if any(name in version.metrics for version in versions)]
    for name in (*shown, "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for version in reversed(versions):
        about = version.description
        style = STYLES[version.state]
        size = sum(file.bytes for file in version.files.values())
        precision = "" if about.precision == "fp32" else f", {about.precision}"
        table.add_row(
            Text(version.name, style),
            Text(version.state, style),
            Text(about.name),
            Text(f"{about.backbone}, {about.width}"),
            Text(f"{about.size} px{precision}"),
            Text(f"{version.parent}, {version.kind}" if version.parent else version.kind),
            Text(f"{version.created:%Y-%m-%d}"),
            *(Text(_figure(version.metrics.get(name))) for name in shown),
            Text(f"{size / 1e6:.1f}" if version.files else "pruned"),
        )
    return table


def version_tables(version: Version, events: Iterable[Event]) -> list[Table]:
    """All that is known of one version."""
    about = version.description
    facts = _pairs(f"{version.name}, {version.state}")
    lineage = f"{version.kind}, from {version.parent}" if version.parent else version.kind
    rows: dict[str, str] = {
        "name": about.name,
        "added": f"{_moment(version.created)} UTC",
        "lineage": lineage,
        "backbone": f"{about.backbone}, features {about.width} wide",
        "input": f"{about.size} px, cut from a short side of {about.resize}",
        "exported": _exported(version),
        "method": about.method,
        "branch": about.branch,
        "images seen": f"{about.images_seen:,}" if about.images_seen else "",
        "data": about.data,
        "licence": about.licence,
        "recipe": about.recipe_hash,
        "weights": about.weights_hash,
    }
    rows |= {f"file {role}": f"{file.sha256}, {file.bytes:,} bytes" for role, file in version.files.items()}
    if not version.files:
        rows["files"] = "pruned"
    rows |= {name: _short(value) for name, value in version.facts.items()}
    for name, value in rows.items():
        if value:
            facts.add_row(Text(name), Text(value))
    tables = [facts]
    if version.metrics:
        metrics = _pairs("metrics")
        for name, figure in version.metrics.items():
            metrics.add_row(Text(name), Text(_figure(figure)))
        tables.append(metrics)
    kept = list(events)
    tables.append(_history(kept))
    reports = [event.report for event in kept if event.report is not None]
    return tables + ([report_table(reports[-1])] if reports else [])


def report_table(report: GateReport) -> Table:
    """The checks of a gate, each with its figure, its bound and what it asks."""
    verdict = "passed" if report.passed else "refused"
    beside = f"against {report.against}" if report.against else "nothing serves: absolute bounds only"
    table = _table("check", "", "figure", "bound", "what it asks")
    table.title, table.title_justify = Text(f"gate: {report.version} {verdict} ({beside})", "bold"), "left"
    table.caption, table.caption_justify = Text(f"measured on {report.probe}"), "left"
    for column in table.columns[2:4]:
        column.justify = "right"
    table.columns[-1].no_wrap = False
    for check in report.checks:
        style = "" if check.passed else "bold red"
        answer = Text("ok" if check.passed else "FAILED", style or "green")
        figures = Text(_figure(check.value), style), Text(_figure(check.bound))
        table.add_row(Text(check.name, style), answer, *figures, Text(check.why))
    return table


def failed_in_words(checks: Iterable[Check]) -> str:
    """The checks that were not passed, on one line."""
    return "; ".join(
        check.name if check.value is None else f"{check.name} {_figure(check.value)} (bound {_figure(check.bound)})"
        for check in checks
    )


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table of both versions' values with what differs marked, and one of their agreement."""
    first, second = (version.name for version in comparison.versions)
    table = _table("", first, second, "")
    for column in table.columns:
        column.no_wrap = False
    for section, rows in comparison.sections().items():
        if rows:
            table.add_row(Text(section, "bold"))
        for name, (one, other) in rows.items():
            if one in (None, "") and other in (None, ""):
                continue
            differs = one != other
            change = f"{other - one:+.4g}" if section == "metrics" and None not in (one, other) and differs else ""
            style = "yellow" if differs else "dim"
            table.add_row(Text(f"  {name}"), Text(_short(one), style), Text(_short(other), style), Text(change))
    agreement = _pairs("features of the same images")
    if comparison.agreement is not None:
        for name, figure in comparison.agreement.as_dict().items():
            agreement.add_row(Text(name.replace("_", " ")), Text(_figure(figure)))
    agreement.add_row(Text("images"), Text(comparison.probe))
    return [table, agreement]


def _history(events: Iterable[Event]) -> Table:
    table = _table("when (UTC)", "what", "who", "why")
    table.title, table.title_justify = Text("history", "bold"), "left"
    table.columns[-1].no_wrap = False
    for event in events:
        why = event.why or ("" if event.report is None else failed_in_words(event.report.failed))
        table.add_row(*map(Text, (_moment(event.time), event.action, event.who, why)))
    return table


def _exported(version: Version) -> str:
    about = version.description
    parity = "" if about.parity is None else f", within {about.parity:.1e} of its network"
    agreement = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in about.agreement.items())
    return f"{about.precision}, {about.layout}{parity}{agreement}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def _pairs(title: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, title=Text(title, "bold"), title_justify="left")
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    return table


def _moment(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _figure(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4g}"


def _short(value: Any) -> str:
    if value is None or value == "":
        return NOTHING
    if isinstance(value, float):
        return _figure(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(inner)}" for name, inner in value.items() if not isinstance(inner, dict))
    return str(value)
