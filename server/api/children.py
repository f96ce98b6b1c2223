"""`lowssl registry` and the like in processes of their own: what needs torch is done there, serving does without."""

import asyncio
import os
import re
import sys
from collections.abc import Sequence

from server.settings import PREFIX, Settings

_FOR_THE_CHILD = ("data_dir", "database_url", "files_url", "probe", "probe_labelled")
# An export and a gate take seconds to a few minutes.
_LONGEST_SECONDS = 900.0
# So that requests for embeddings do not wait for it.
_NICENESS = 10


def registry_command(*arguments: str) -> list[str]:
    """The command line of `lowssl registry`."""
    return lowssl_command("registry", *arguments)


def lowssl_command(*arguments: str) -> list[str]:
    """The command line of `lowssl`."""
    return [sys.executable, "-m", "lowssl_core.command_line", *arguments]


async def run_child(command: Sequence[str], settings: Settings) -> tuple[int | None, bytes]:
    """Run a command beside the serving, at a lower priority; returns its status and what it wrote to stderr.

    It is killed where it takes longer than fifteen minutes, and where the caller is cancelled.
    """
    child = await asyncio.create_subprocess_exec(
        *command,
        env=child_environment(settings),
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


def child_environment(settings: Settings) -> dict[str, str]:
    """The settings that this server has, wherever they came from; passwords are not for command lines."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    values = {name: getattr(settings, name) for name in _FOR_THE_CHILD}
    return kept | {PREFIX + name.upper(): str(value) for name, value in values.items() if value is not None}


def last_line(errors: bytes) -> str:
    """What a command that failed said, without its own name."""
    lines = errors.decode("utf-8", "replace").strip().splitlines() or [""]
    return re.sub(r"^lowssl \w+: ", "", lines[-1])
