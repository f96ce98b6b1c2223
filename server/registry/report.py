"""The gate's report: named checks with their figures and bounds, kept with the promotion or refusal they led to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question of the gate.

    Attributes:
        name: a word or two.
        passed: the answer.
        value: what was measured; None where it could not be.
        bound: what it may not be below, or above; None where there is no such number.
        why: one sentence: what was asked and what it came to.
    """

    name: str
    passed: bool
    value: float | None
    bound: float | None
    why: str


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What the gate found of one version.

    Attributes:
        version: its name.
        against: the version that served then, by name; None: none did, and only absolute bounds counted.
        probe: the images it was measured on, in words and with a hash of them and of the measures.
        checks: in the order in which they were made.
        figures: all that was measured, finite, by name; they become metrics of the version.
    """

    version: str
    against: str | None
    probe: str
    checks: Sequence[Check]
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def as_dict(self) -> dict[str, Any]:
        """All of it, and whether it passed, for JSON."""
        return {"passed": self.passed, **asdict(self), "checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """What `as_dict` made."""
        fields = {key: value for key, value in tree.items() if key not in ("passed", "checks")}
        return cls(checks=[Check(**check) for check in tree["checks"]], **fields)
