"""The federation's part of a running server: SuperLink, passage, rounds ordered in time, and versions made of them."""

import asyncio
import contextlib
import json
import time
from datetime import UTC, datetime

from fastapi import Request

from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from server.api.children import last_line, lowssl_command, run_child
from server.api.service import Service
from server.federation import orders
from server.federation.federation import Federation
from server.federation.fleet import FleetPassage
from server.federation.history import History
from server.federation.joins import list_devices
from server.federation.operation import Operation
from server.federation.overview import TROUBLE_FILE, order_rounds
from server.federation.schedule import is_round_due
from server.federation.superlink import SuperLinkError
from server.federation.versions import next_round

_LOOK_SECONDS = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 900.0  # after a version that could not be made


class Federating:
    """Opened and closed by the application's lifespan; serving goes on whatever happens here.

    Attributes:
        folder: of the federation.
        federation: keeps SuperLink and rounds going.
        passage: devices' way to the SuperLink.
        joining: held while a device joins.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.folder = service.settings.federation_folder
        self.federation = Federation(self.folder)
        superlink = self.federation.superlink
        self.passage = FleetPassage(superlink.address, superlink.certificate.path)
        self.joining = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Future[None] | None = None
        self._looked_at: tuple[int, int, Operation] | None = None
        self._failures, self._not_before = 0, 0.0

    @staticmethod
    def of(request: Request) -> "Federating":
        """The federation of the server that a request came to."""
        federating = request.app.state.federating
        assert isinstance(federating, Federating)
        return federating

    async def start(self) -> None:
        """Begin; the SuperLink takes seconds to start, which embeddings do not wait for."""
        self._starting = asyncio.ensure_future(asyncio.to_thread(self._start))
        self._tasks = [asyncio.create_task(self._keep_ordering()), asyncio.create_task(self._keep_making())]

    async def close(self) -> None:
        """End all of it; a round or a version under way is done again after the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # In this order: a SuperLink waits for its open connections.
        await self.passage.close()
        if self._starting is not None:
            await self._starting
        await asyncio.to_thread(self.federation.close)

    def register(self, public_key: str, name: str) -> int:
        """Tell Flower of a device, also of one that it knows but whose joining was cut off; returns Flower's id.

        Raises:
            SuperLinkError: it does not answer, or refuses.
            UserError: the device was removed; Flower never takes its key again.
        """
        superlink = self.federation.superlink
        try:
            return superlink.register(public_key, name)
        except SuperLinkError as error:
            if "already in use" not in str(error).lower():
                raise
            known = {device.node for device in list_devices(self._service.registry.database)}
            left = [device.node for device in superlink.devices() if device.node not in known]
            if not left:
                raise UserError(
                    "this device was removed, and its key stays out; from an empty folder it joins with a new key"
                ) from None
            if len(left) > 1:
                raise
            return left[0]

    def _start(self) -> None:
        try:
            self.federation.start()
        except UserError as error:
            self._service.log.error("the federation cannot start", reason=str(error))

    async def _keep_ordering(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._order_if_due)
            except Exception:  # a database out of reach, a full disk: the next look may find it mended
                self._service.log.exception("rounds cannot be scheduled")
                await asyncio.sleep(_FIRST_PAUSE)
            await asyncio.sleep(_LOOK_SECONDS)

    def _order_if_due(self) -> None:
        operation = Operation.load(self.folder)
        if operation is None or (operation.schedule.every_hours is None and operation.schedule.devices is None):
            return
        history = History(self.folder)
        if orders.is_stopped(self.folder) or orders.ordered(self.folder) > history.newest():
            return
        last = history.records(2)[-1]  # the newest may be one that is cut
        devices = list_devices(self._service.registry.database)
        if is_round_due(operation.schedule, last, devices, datetime.now(UTC)):
            order_rounds(self.folder, 1)

    async def _keep_making(self) -> None:
        while True:
            try:
                await self._make_next()
            except Exception:
                self._service.log.exception("versions cannot be made")
                await asyncio.sleep(_FIRST_PAUSE)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _make_next(self) -> None:
        """Make the next round that has none a version, in a process of its own, which has torch."""
        if time.monotonic() < self._not_before:
            return
        number = await asyncio.to_thread(self._next_round)
        if number is None:
            return
        service = self._service
        async with service.judging:
            status, errors = await run_child(lowssl_command("federation", "version", str(number)), service.settings)
        trouble = self.folder / TROUBLE_FILE
        if status == 0:
            self._failures, self._not_before = 0, 0.0
            trouble.unlink(missing_ok=True)
            await service.engine.refresh()
            return
        reason = last_line(errors) or f"it ended with status {status}"
        self._not_before = time.monotonic() + min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
        self._failures += 1
        service.log.error("no version of a round", round=number, status=status, said=errors.decode("utf-8", "replace"))
        with contextlib.suppress(OSError):
            text = json.dumps({"round": number, "reason": reason})
            await asyncio.to_thread(write_atomically, trouble, lambda file: file.write(text.encode()))

    def _next_round(self) -> int | None:
        operation = Operation.load(self.folder)
        if operation is None:
            return None
        # The registry is asked only when something may have changed.
        looked_at = (History(self.folder).newest(), orders.ordered(self.folder), operation)
        if looked_at == self._looked_at:
            return None
        number = next_round(self._service.registry.versions(), self.folder, operation)
        if number is None:
            self._looked_at = looked_at
        return number
