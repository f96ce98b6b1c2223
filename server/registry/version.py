"""What the registry keeps: versions, their files, and what happened to them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from lowssl_core.errors import UserError
from lowssl_core.export.description import Description
from server.registry.report import GateReport

State = Literal["candidate", "serving", "refused", "retired"]
Kind = Literal["pretrained", "federated", "imported"]
Action = Literal["add", "promote", "force", "refuse", "retire", "rollback", "prune"]

# The role of the file that is served, and of the weights for torch.
ONNX, ENCODER = "onnx", "encoder"


class UnknownVersionError(UserError):
    """The registry has no such version."""


class StaleReportError(UserError):
    """Another version serves than the one that a candidate was judged against: it must be judged again."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file in the store, by its content: SHA-256 in hexadecimal digits, and length."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of the encoder, as it was when it was read.

    Attributes:
        number: from 1, without gaps.
        kind: where it came from: lowssl-pretrain, a federated round, elsewhere.
        parent: the version that it was trained on from, by name.
        state: see `Registry`.
        created: when it was added; aware, UTC.
        description: what the exported file says of itself, with the registry's name as its version.
        files: by role, "onnx" (what is served) and "encoder" (weights for torch); empty after they were pruned.
        metrics: figures, those of the gate among them; finite.
        facts: what else is known of it, as JSON: its lineage, its source's name.
    """

    number: int
    kind: Kind
    parent: str | None
    state: State
    created: datetime
    description: Description
    files: Mapping[str, StoredFile]
    metrics: Mapping[str, float]
    facts: Mapping[str, object]

    @property
    def name(self) -> str:
        """What people and programs call it: "v1", "v2" ..."""
        return version_name(self.number)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a version.

    Attributes:
        time: aware, UTC.
        version: its name.
        action: "add"; "promote", or "force" where the gate had refused; "refuse"; "rollback", of the version that
            serves again; "retire", of the version that another replaced; "prune", of one whose files were removed.
        who: user@host on the command line, a key's name over REST.
        why: in their words, or "".
        report: what the gate found, where it was asked.
    """

    time: datetime
    version: str
    action: Action
    who: str
    why: str
    report: GateReport | None


def version_name(number: int) -> str:
    """The name of a version's number."""
    return f"v{number}"


def version_number(name: str) -> int:
    """The number of a version's name.

    Raises:
        UnknownVersionError: no version is called so.
    """
    # As many digits as every database's integers hold.
    if not re.fullmatch(r"v[1-9][0-9]{0,8}", name):
        raise UnknownVersionError(f"there is no version {name[:40]!r}: versions are called v1, v2 ...")
    return int(name[1:])
