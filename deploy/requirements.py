"""Prints what the package and some of its extras need, a requirement a line, from pyproject.toml alone.

So an image's dependencies are a layer of their own, which new code leaves as it is.
"""

import sys
import tomllib
from collections.abc import Iterable, Iterator

with open("pyproject.toml", "rb") as file:
    PROJECT = tomllib.load(file)["project"]


def needed(requirements: Iterable[str]) -> Iterator[str]:
    """The requirements, with those of the package's own extras in their place."""
    for requirement in requirements:
        name, _, extras = requirement.partition("[")
        if name == PROJECT["name"]:
            for extra in extras.rstrip("]").split(","):
                yield from needed(PROJECT["optional-dependencies"][extra])
        else:
            yield requirement


own = [f"{PROJECT['name']}[{extra}]" for extra in sys.argv[1:]]
print(*dict.fromkeys(needed([*PROJECT["dependencies"], *own])), sep="\n")
