"""What a person asks of a federation, left as files that its running part looks at, and what it tells back."""

import json
from pathlib import Path
from typing import Any

from lowssl_core.files import write_atomically


def order(folder: Path, until: int) -> None:
    """Ask for rounds until the model has version `until`."""
    (folder / "stop").unlink(missing_ok=True)
    write_atomically(folder / "order.json", lambda file: file.write(json.dumps({"until": until}).encode()))


def ordered(folder: Path) -> int:
    """The version that was asked for; 0 if none was, or nobody can tell which: the next order writes it anew."""
    try:
        return int(json.loads((folder / "order.json").read_text())["until"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        return 0


def stop(folder: Path) -> None:
    """Ask the running part to stop; what is not completed is done again when it goes on."""
    write_atomically(folder / "stop", lambda file: None)


def is_stopped(folder: Path) -> bool:
    """Whether it was asked to stop."""
    return (folder / "stop").exists()


def release(folder: Path, device: str) -> None:
    """Ask that a device be taken out of quarantine, before the next round or while it waits for devices."""
    write_atomically(folder / "release" / device, lambda file: None)


def releases(folder: Path) -> list[str]:
    """The devices to be taken out of quarantine, until `forget_release`."""
    return [path.name for path in sorted((folder / "release").glob("*")) if not path.name.startswith(".")]


def forget_release(folder: Path, device: str) -> None:
    """A device's release is written down with a round, and needs no asking any more."""
    (folder / "release" / device).unlink(missing_ok=True)


def tell(folder: Path, status: dict[str, Any]) -> None:
    """Write down where the federation stands; after a power cut it does not matter any more."""
    new = folder / "status.json.new"
    new.write_text(json.dumps(status))
    new.replace(folder / "status.json")


def told(folder: Path) -> dict[str, Any]:
    """Where the federation stood when its running part last told; empty if it never has."""
    try:
        status: dict[str, Any] = json.loads((folder / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return status
