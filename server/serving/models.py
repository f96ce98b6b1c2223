"""Where versions come from, and the sessions of those that are loaded."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

from server.serving.errors import NoModel
from server.serving.session import EncoderSession


@dataclass(frozen=True)
class Model:
    """A version that can be served: its name, such as v3, and its ONNX file on this machine."""

    version: str
    path: Path


class Models(Protocol):
    """What the engine asks of a registry; both methods are called in a thread and may take their time."""

    def serving(self) -> Model | None:
        """The version that serves, None if none does yet."""

    def find(self, version: str) -> Model:
        """The version of that name; `UnknownVersion` if there is none or it cannot be served."""


@dataclass(frozen=True)
class Loaded:
    """A version's session. Who holds one has a lease: the session's memory is freed with the last of them."""

    version: str
    session: EncoderSession


class LoadedModels:
    """The sessions at hand: of the serving version, and of a few others that were asked for by name.

    Args:
        models: the registry.
        load: opens a file; called in a thread, one at a time, so that memory holds no more than one version in excess.
        keep: how many others than the serving one stay loaded.
    """

    def __init__(self, models: Models, load: Callable[[Path], EncoderSession], *, keep: int) -> None:
        self._models = models
        self._load = load
        self._keep = keep
        self._serving: Loaded | None = None
        self._others: OrderedDict[str, Loaded] = OrderedDict()  # the one used last at the end
        self._lock = Lock()  # the event loop and the thread that loads both look and change
        self._thread = ThreadPoolExecutor(1, "load-models")

    @property
    def serving(self) -> Loaded | None:
        """The version that serves."""
        return self._serving

    @property
    def versions(self) -> tuple[str, ...]:
        """What is loaded: the serving version, then the others, the one used last at the end."""
        with self._lock:
            return (*((self._serving.version,) if self._serving else ()), *self._others)

    def lease_serving(self) -> Loaded:
        """The version that serves; `NoModel` if none does."""
        if self._serving is None:
            raise NoModel("no model serves yet: import one and promote it")
        return self._serving

    async def lease(self, version: str) -> Loaded:
        """The version of that name, loaded if need be; `UnknownVersion` if there is none."""
        if found := self._find(version):
            return found
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._open_other, version)

    async def refresh(self) -> bool:
        """Ask which version serves now, and serve it: requests that began go on with the one before.

        Returns whether it is another one than before.
        """
        loaded = await asyncio.get_running_loop().run_in_executor(self._thread, self._open_serving)
        with self._lock:
            changed = loaded is not self._serving
            self._serving = loaded
            if loaded is not None:
                self._others.pop(loaded.version, None)
        return changed

    def close(self) -> None:
        """Drop every session that no request holds."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._serving = None
            self._others.clear()

    def _find(self, version: str) -> Loaded | None:
        with self._lock:
            if self._serving is not None and self._serving.version == version:
                return self._serving
            if version in self._others:
                self._others.move_to_end(version)
            return self._others.get(version)

    def _open_other(self, version: str) -> Loaded:
        # Many requests may ask for it at once: the thread opens it for the first and finds it for the rest.
        if found := self._find(version):
            return found
        loaded = self._open(self._models.find(version))
        with self._lock:
            self._others[version] = loaded
            while len(self._others) > self._keep:
                self._others.popitem(last=False)
        return loaded

    def _open_serving(self) -> Loaded | None:
        model = self._models.serving()
        return None if model is None else self._find(model.version) or self._open(model)

    def _open(self, model: Model) -> Loaded:
        return Loaded(model.version, self._load(model.path))
