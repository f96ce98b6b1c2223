"""`lowssl-client status`: what a device does and knows, from its agent where one runs, and from its folder."""

import dataclasses
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.channel import ChannelError, Frame, NobodyListensError, ask
from client.contents import count_arrivals, count_memory, list_set_aside, looked_at, read_facts
from client.folder import ARRIVALS, MEMORY, NEWS, PAUSED, SOCKET, TALLY, read_joined

_SECONDS = 10.0
_SET_ASIDE = 20


def look(folder: Path) -> dict[str, Any]:
    """Everything that is known of a device, as plain values.

    Keys: `joined` (or None), `agent` (what it answered, or None), `problem` (why one that runs did not answer),
    `paused`, `images`, `memory`, `news` (what the server was told last of new images), `rounds`.
    """
    joined = read_joined(folder)
    agent, problem = None, ""
    try:
        agent = dict(ask(folder / SOCKET, Frame({"ask": "status"}), seconds=_SECONDS).header)
    except NobodyListensError:
        pass
    except ChannelError as error:
        problem = str(error)
    return {
        "folder": str(folder),
        "joined": None if joined is None else dataclasses.asdict(joined),
        "agent": agent,
        "problem": problem,
        "paused": (folder / PAUSED).exists(),
        "images": _images(folder / ARRIVALS),
        "memory": _memory(folder / MEMORY),
        "news": read_facts(folder / NEWS),
        "rounds": read_facts(folder / TALLY),
    }


def describe(facts: dict[str, Any], now: datetime | None = None) -> str:
    """What `look` found, for people."""
    now = now or datetime.now(UTC)
    rows = [
        *_about_device(facts),
        *_about_images(facts),
        *_about_news(facts, now),
        *_about_rounds(facts["rounds"], now),
    ]
    return "\n".join(f"{name:<11} {text}".rstrip() for name, text in rows)


def _about_device(facts: dict[str, Any]) -> list[tuple[str, str]]:
    joined, agent = facts["joined"], facts["agent"]
    rows = []
    if joined is None:
        rows.append(("server", "none joined yet: lowssl-client join URL --token T"))
    else:
        rows += [("device", f"{joined['name']} ({joined['device']})"), ("server", joined["url"])]
    if agent is None:
        state = facts["problem"] or "not running"
        return [*rows, ("agent", f"{state}{', paused' if facts['paused'] else ''}")]
    connection = agent.get("connection", {})
    return [
        *rows,
        ("agent", f"running (process {agent.get('pid')}), {_work(agent)}"),
        *[("waits for" if index == 0 else "", reason) for index, reason in enumerate(agent["waiting"])],
        ("connection", connection.get("trouble") or "open"),
    ]


def _work(agent: dict[str, Any]) -> str:
    if agent["stage"] == "idle":
        return "idle"
    learner = agent["learner"]
    if learner.get("round") != agent["round"]:
        return f"preparing round {agent['round']}"
    return f"training round {agent['round']}: step {learner['round_step']} of {learner['round_steps']}"


def _about_images(facts: dict[str, Any]) -> list[tuple[str, str]]:
    images, memory = facts["images"], facts["memory"]
    rows = []
    if images is not None:
        rows.append(
            (
                "images",
                f"{images['files']:,} files: {images['new']:,} new, {images['learned']:,} learned from,"
                f" {images['set_aside']:,} set aside",
            )
        )
        rows += [("", f"{_printable(path)}: {reason}") for path, reason in images["reasons"].items()]
    if memory is not None:
        rows.append(("memory", f"{memory['images']:,} images, {memory['bytes'] / 1e6:,.1f} MB"))
    return rows


def _about_news(facts: dict[str, Any], now: datetime) -> list[tuple[str, str]]:
    news, agent = facts["news"], facts["agent"] or {}
    rows = []
    if news:
        images = "1 new image" if news["new_images"] == 1 else f"{news['new_images']:,} new images"
        rows.append(f"the server was told of {images} {_ago(news['at'], now)}")
    if trouble := agent.get("news", {}).get("trouble"):
        rows.append(f"not told{' since' if news else ''}: {trouble}")
    return [("news" if index == 0 else "", row) for index, row in enumerate(rows)]


def _about_rounds(rounds: dict[str, Any], now: datetime) -> list[tuple[str, str]]:
    rows = [("rounds", f"{rounds.get('answered', 0):,} answered, {rounds.get('refused', 0):,} not")]
    if (last := rounds.get("last")) is not None:
        told = [f"round {last['round']}, {_ago(last['at'], now)}: {last['steps']} steps"]
        told += [f"loss {last['loss']:.4g}"] if last["loss"] is not None else []
        told += [f"drift {last['drift']:.2f}"] if last["drift"] is not None else []
        rows.append(("last", ", ".join(told)))
    if (error := rounds.get("error")) is not None:
        rows.append(("last error", f"round {error['round']}, {_ago(error['at'], now)}: {error['reason']}"))
    return rows


def _printable(path: str) -> str:
    """A path whose name may be no text at all, as terminals take it."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def _ago(when: str, now: datetime) -> str:
    seconds = max(0.0, (now - datetime.fromisoformat(when)).total_seconds())
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} seconds ago"


def _images(path: Path) -> dict[str, Any] | None:
    try:
        with looked_at(path) as index:
            return dataclasses.asdict(count_arrivals(index)) | {"reasons": list_set_aside(index, _SET_ASIDE)}
    except sqlite3.Error:
        return None


def _memory(path: Path) -> dict[str, int] | None:
    try:
        with looked_at(path) as memory:
            return count_memory(memory) | {"bytes": path.stat().st_size}
    except (sqlite3.Error, OSError):
        return None
