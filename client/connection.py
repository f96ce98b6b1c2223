"""The way to the server: open while it may be, closed while traffic costs money."""

import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from client.node import Node

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0


class Connection:
    """Keeps a device connected, but for times when the network is metered.

    A message that arrives is a whole model, which nobody has asked for; so on a metered network the device takes its
    leave, and the server asks others.

    Args:
        make_node: makes the way to the server, each time it is opened.
        closed_by: why it must be closed, in words; nothing if it may be open.
        look_seconds: between two looks at that.
    """

    def __init__(
        self, make_node: Callable[[], Node], closed_by: Callable[[], Sequence[str]], look_seconds: float = _LOOK_SECONDS
    ) -> None:
        self._make_node, self._closed_by, self._look_seconds = make_node, closed_by, look_seconds
        self._node: Node | None = None
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="connection", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopping.set()
        self._thread.join()
        self._close()

    def status(self) -> dict[str, Any]:
        """Whether the device is connected, and if not, why."""
        node, reasons = self._node, self._closed_by()
        trouble = ", ".join(reasons) or "not connected yet" if node is None else node.trouble()
        return {"open": not trouble, "trouble": trouble}

    def _watch(self) -> None:
        while not self._is_stopping.wait(self._look_seconds):
            try:
                self._look()
            except OSError as error:  # a full disk, for example: there may be space again
                _LOG.warning("cannot connect: %s", error)

    def _look(self) -> None:
        reasons = self._closed_by()
        if reasons and self._node is not None:
            _LOG.info("disconnects: %s", ", ".join(reasons))
            self._close()
        elif not reasons and self._node is None:
            node = self._make_node()
            node.start()
            self._node = node
            _LOG.info("connects to the server")
        elif self._node is not None:
            self._node.mend()

    def _close(self) -> None:
        if self._node is not None:
            self._node.stop()
            self._node = None
