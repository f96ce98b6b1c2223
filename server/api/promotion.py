"""Promotion by the API: the gate runs in a process of its own, and the registry says what came of it."""

import asyncio

from server.api.children import last_line, registry_command, run_child
from server.api.problems import Problem
from server.api.service import Service
from server.registry.registry import Registry
from server.registry.version import Event, Version


async def promote(service: Service, name: str, *, who: str, why: str, force: bool) -> tuple[Version, Event]:
    """Let the gate judge a version and, if it passes, let it serve; returns it with the event of its promotion.

    Raises:
        Problem: 409 if the gate or the registry refuses it, with the reason; 500 if judging failed.
    """
    if service.judging.locked():
        raise Problem(409, "another version is being judged; try again when that is done", code="busy")
    arguments = ["promote", name, f"--who={who}", f"--why={why}", *(["--force"] if force else [])]
    async with service.judging:
        status, errors = await run_child(registry_command(*arguments), service.settings)
    version, event = await asyncio.to_thread(_look, service.registry, name)
    if status == 0 and version.state == "serving":
        return version, event
    if status == 1 and event.action == "refuse":
        raise Problem(409, last_line(errors), code="refused")
    if status == 2:
        raise Problem(409, last_line(errors))
    service.log.error("promotion failed", version=name, status=status, said=errors.decode("utf-8", "replace"))
    raise Problem(500, f"judging {name} failed; the server's log says how")


def _look(registry: Registry, name: str) -> tuple[Version, Event]:
    return registry.version(name), registry.events(name)[-1]
