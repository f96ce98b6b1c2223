"""Promotion by the API: the gate runs in a process of its own, and the registry says what came of it."""

import asyncio
import os

from server.api.children import child_environment, last_line, registry_command
from server.api.problems import Problem
from server.api.service import Service
from server.registry.registry import Registry
from server.registry.version import Event, Version

# A gate takes seconds to a few minutes.
_LONGEST_SECONDS = 900.0
# So that requests for embeddings do not wait for it.
_NICENESS = 10


async def promote(service: Service, name: str, *, who: str, why: str, force: bool) -> tuple[Version, Event]:
    """Let the gate judge a version and, if it passes, let it serve; returns it with the event of its promotion.

    Raises:
        Problem: 409 if the gate or the registry refuses it, with the reason; 500 if judging failed.
    """
    if service.judging.locked():
        raise Problem(409, "another version is being judged; try again when that is done", code="busy")
    arguments = ["promote", name, f"--who={who}", f"--why={why}", *(["--force"] if force else [])]
    async with service.judging:
        status, errors = await _run(service, arguments)
    version, event = await asyncio.to_thread(_look, service.registry, name)
    if status == 0 and version.state == "serving":
        return version, event
    if status == 1 and event.action == "refuse":
        raise Problem(409, last_line(errors), code="refused")
    if status == 2:
        raise Problem(409, last_line(errors))
    service.log.error("promotion failed", version=name, status=status, said=errors.decode("utf-8", "replace"))
    raise Problem(500, f"judging {name} failed; the server's log says how")


async def _run(service: Service, arguments: list[str]) -> tuple[int | None, bytes]:
    child = await asyncio.create_subprocess_exec(
        *registry_command(*arguments),
        env=child_environment(service.settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            _, errors = await child.communicate()
    except TimeoutError:
        errors = b"it took longer than %d minutes" % (_LONGEST_SECONDS // 60)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return child.returncode, errors


def _look(registry: Registry, name: str) -> tuple[Version, Event]:
    return registry.version(name), registry.events(name)[-1]
