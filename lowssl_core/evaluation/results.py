"""What a judgement comes to: figures for each subject, as a table for people and JSON for programs."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowssl_core.files import write_atomically

NOTE_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one subject.

    Attributes:
        subject: "student", "teacher", "recalibrated", or what else was judged.
        values: by name, in the order of the table's columns.
        details: what JSON has beside them (settings chosen, curves).
    """

    subject: str
    values: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results:
    """One task's judgement.

    Attributes:
        task: its name.
        model: what the user named.
        settings: what it takes to repeat it: data, sizes, seeds.
        rows: a row for each subject.
        notes: sentences below the table that say what the columns mean.
    """

    task: str
    model: str
    settings: Mapping[str, Any]
    rows: Sequence[Figures]
    notes: Sequence[str] = ()

    def table(self) -> str:
        """A table of plain text, a row for each subject, shares and metrics with three digits after the point."""
        columns: list[str] = []
        for row in self.rows:
            columns += [name for name in row.values if name not in columns]
        first = max(len(row.subject) for row in self.rows)
        widths = [max(len(name), 7) for name in columns]
        lines = ["  ".join([" " * first, *(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))])]
        for row in self.rows:
            cells = (
                f"{row.values[name]:>{width}.3f}" if name in row.values else f"{'-':>{width}}"
                for name, width in zip(columns, widths, strict=True)
            )
            lines.append("  ".join([f"{row.subject:<{first}}", *cells]))
        wrapped = [line for note in self.notes for line in textwrap.wrap(note, NOTE_WIDTH)]
        return "\n".join([*lines, *([""] if wrapped else []), *wrapped])

    def write_json(self, path: Path) -> None:
        """Write all of it atomically."""
        data = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(data.encode()))
