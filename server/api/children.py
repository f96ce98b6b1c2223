"""`lowssl registry` in processes of its own: what needs torch is done there, and serving does without."""

import os
import sys

from server.settings import PREFIX, Settings

_FOR_THE_CHILD = ("data_dir", "database_url", "files_url", "probe", "probe_labelled")


def registry_command(*arguments: str) -> list[str]:
    """The command line of `lowssl registry`."""
    return [sys.executable, "-m", "lowssl_core.command_line", "registry", *arguments]


def child_environment(settings: Settings) -> dict[str, str]:
    """The settings that this server has, wherever they came from; passwords are not for command lines."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    values = {name: getattr(settings, name) for name in _FOR_THE_CHILD}
    return kept | {PREFIX + name.upper(): str(value) for name, value in values.items() if value is not None}


def last_line(errors: bytes) -> str:
    """What a command that failed said, without its own name."""
    lines = errors.decode("utf-8", "replace").strip().splitlines() or [""]
    return lines[-1].removeprefix("lowssl registry: ")
