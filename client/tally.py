"""The tally of a device's rounds: how many were answered, the last one, and the last error; it outlives the agent."""

import contextlib
import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.contents import read_facts
from lowssl_core.files import write_atomically
from lowssl_core.protocol.messages import Update


class Tally:
    """Counts in a small file, for people; a damaged one is begun anew.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, Any] = {"answered": 0, "refused": 0, "last": None, "error": None} | read_facts(path)

    def as_dict(self) -> dict[str, Any]:
        """The counts, and when and what was last."""
        return dict(self._facts)

    def answer(self, key: str, update: Update) -> None:
        """Count a task as answered, before its reply is written; after a kill the same one counts once.

        Args:
            key: of the task.
            update: the answer.

        Raises:
            OSError: the disk is full.
        """
        last = self._facts["last"]
        again = last is not None and last["key"] == key
        self._write(
            answered=self._facts["answered"] + (not again),
            last={"key": key, "round": update.round, "at": _now(), **dataclasses.asdict(update.metrics)},
        )

    def refuse(self, round_: int, reason: str) -> None:
        """Count a task as refused."""
        with contextlib.suppress(OSError):  # a full disk may be the very reason
            self._write(
                refused=self._facts["refused"] + 1, error={"round": round_, "at": _now(), "reason": reason[:1000]}
            )

    def _write(self, **changed: Any) -> None:
        self._facts |= changed
        data = json.dumps(self._facts, indent=2).encode()
        write_atomically(self._path, lambda file: file.write(data))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
