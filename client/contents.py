"""What the files in a device's folder hold, counted without numpy or an image: quick enough for `status`."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEW, LEARNED, BAD = range(3)
"""States of an image in the index of arrivals."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """All that is known of a folder.

    Attributes:
        new: images that are there and were not learned from.
        learned: images learned from, there or gone.
        set_aside: images or files that cannot be used.
        files: in the folder.
    """

    new: int
    learned: int
    set_aside: int
    files: int


def count_arrivals(index: sqlite3.Connection) -> Counts:
    """How many images and files of each kind the index of arrivals knows."""
    by_state = dict(
        index.execute(
            "SELECT state, count(*) FROM contents"
            " WHERE state != ? OR EXISTS (SELECT 1 FROM files WHERE content = contents.id) GROUP BY state",
            (NEW,),
        )
    )
    ((unread,),) = index.execute("SELECT count(*) FROM files WHERE reason != ''")
    ((files,),) = index.execute("SELECT count(*) FROM files")
    return Counts(
        new=by_state.get(NEW, 0),
        learned=by_state.get(LEARNED, 0),
        set_aside=by_state.get(BAD, 0) + unread,
        files=files,
    )


def list_set_aside(index: sqlite3.Connection, limit: int) -> dict[str, str]:
    """At most `limit` files that cannot be used, by path in the watched folder, the last found first, and why."""
    rows = index.execute(
        "SELECT path, CASE WHEN files.reason = '' THEN contents.reason ELSE files.reason END FROM files"
        " LEFT JOIN contents ON contents.id = content WHERE files.reason != '' OR state = ?"
        " ORDER BY files.id DESC LIMIT ?",
        (BAD, limit),
    )
    return {os.fsdecode(path): reason for path, reason in rows}


def count_memory(memory: sqlite3.Connection) -> dict[str, int]:
    """How many images the replay memory holds, and how many wait to join it."""
    by_stage = dict(memory.execute("SELECT staged, count(*) FROM images GROUP BY staged"))
    return {"images": by_stage.get(0, 0), "staged": by_stage.get(1, 0)}


def read_facts(path: Path) -> dict[str, Any]:
    """What a small file of facts (JSON) says; nothing where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.read_bytes())
        if isinstance(facts, dict):
            return facts
    return {}


@contextlib.contextmanager
def looked_at(path: Path) -> Iterator[sqlite3.Connection]:
    """A database for looking at, beside whoever works with it.

    Raises:
        sqlite3.Error: there is none, or it cannot be used.
    """
    # Not "ro": after a kill the first who opens the file rolls back what was not committed.
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=1.0)) as connection:
        yield connection
