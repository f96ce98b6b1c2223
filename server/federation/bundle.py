"""The Flower app that devices are sent: a file that names modules of their own installation, and no code."""

from pathlib import Path

from lowssl_core import __version__
from lowssl_core.files import write_atomically

_PYPROJECT = """\
[project]
name = "lowssl-federation"
version = "{version}"

[tool.flwr.app]
publisher = "lowssl"

[tool.flwr.app.components]
serverapp = "server.flower:app"
clientapp = "client.flower:app"

[tool.flwr.app.config]
"""


def write_bundle(folder: Path) -> Path:
    """Write the bundle's folder; returns it."""
    text = _PYPROJECT.format(version=__version__)
    write_atomically(folder / "pyproject.toml", lambda file: file.write(text.encode()))
    return folder
