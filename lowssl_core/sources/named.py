"""torchvision data sets by name, kept in LOWSSL_DATA or the user's cache and fetched there once."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets import CIFAR10, CIFAR100

from lowssl_core.errors import UserError
from lowssl_core.sources.layout import check_split, describe
from lowssl_core.sources.source import ArraySource

# Both fit in memory and come decoded; anything larger is better served by a folder, a zip or shards.
DATA_SETS: dict[str, Callable[..., CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def data_root() -> Path:
    """Return the folder of named data sets: LOWSSL_DATA, or lowssl in the user's cache."""
    if root := os.environ.get("LOWSSL_DATA"):
        return Path(root).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lowssl"


def open_named(name: str, *, split: str | None = None) -> ArraySource:
    """Return a torchvision data set, its train split unless told otherwise; (32, 32, 3) images with labels.

    What is not under `data_root` yet is downloaded, which is said on standard error; UserError without a network.
    """
    taken = check_split(split, ("train", "test"), name)
    root = data_root()
    build = DATA_SETS[name]
    try:
        data = build(root, train=taken == "train", download=False)
    except RuntimeError:  # torchvision's word for: not there, or damaged
        print(f"{name} is not in {root}: downloading it", file=sys.stderr)
        data = _download(build, name, root, taken == "train")
    width = len(str(len(data.data)))
    return ArraySource(
        data.data,
        [f"{taken}/{i:0{width}d}" for i in range(len(data.data))],
        description=describe(name, len(data.data), taken, data.classes),
        split=taken,
        labels=data.targets,
        classes=data.classes,
    )


def _download(build: Callable[..., CIFAR10], name: str, root: Path, train: bool) -> CIFAR10:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none, and a silent network would hang the run
    try:
        return build(root, train=train, download=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {root} and cannot be downloaded ({error}): set LOWSSL_DATA to a folder that holds it,"
            " or give a folder, a zip or shards of images"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
