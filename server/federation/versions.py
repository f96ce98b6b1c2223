"""Which completed rounds are still to become versions of the encoder, judged from what the registry has."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from server.federation import orders
from server.federation.history import History, Record
from server.federation.operation import Operation
from server.registry.version import Version

FACTS = "federation"
"""Of a version that a round became: the key of its facts that says which."""


def next_round(versions: Iterable[Version], folder: Path, operation: Operation) -> int | None:
    """The oldest round that has to become a version, or whose version has not been judged yet; None: there is none.

    Args:
        versions: of the registry.
        folder: of the federation.
        operation: of the federation.
    """
    history, every = History(folder), operation.versions.every
    made = rounds_made(versions, history.run)
    last_ordered = orders.ordered(folder)
    for number in range(1, history.newest() + 1):
        if number not in made and (number % every == 0 or number == last_ordered) and history.has_model(number):
            return number
    # Killed after it was added: an older one than others is left alone, or it would replace them.
    newest = max(made, default=0)
    is_open = operation.versions.promote and newest and made[newest].state == "candidate"
    return newest if is_open else None


def rounds_made(versions: Iterable[Version], run: str) -> dict[int, Version]:
    """The versions that rounds of a federation became, by the round."""
    made: dict[int, Version] = {}
    for version in versions:
        facts = version.facts.get(FACTS)
        if isinstance(facts, dict) and facts.get("run") == run:
            made[int(facts["round"])] = version
    return made


def round_facts(record: Record, run: str) -> dict[str, Any]:
    """What a version keeps of its round; devices are told by their ids."""
    return {
        "run": run,
        "round": record.version,
        "started": record.started,
        "seconds": record.seconds,
        "asked": len(record.asked),
        "devices": len(record.accepted),
        "images": sum(float(row["weight"]) for row in record.accepted),
        "rejected": [{key: row.get(key) for key in ("device", "reason", "detail")} for row in record.rejected],
        "failed": dict(record.failed),
        "epsilon": record.epsilon,
    }


def round_metrics(record: Record) -> dict[str, float]:
    """Figures of a round: how many devices counted, and the means of what they told, weighted as they count."""
    metrics = {"devices": float(len(record.accepted))}
    for name in ("loss", "drift"):
        told = [(row["metrics"][name], row["weight"]) for row in record.accepted if row["metrics"][name] is not None]
        if told:
            metrics[name] = sum(value * weight for value, weight in told) / sum(weight for _, weight in told)
    return metrics
