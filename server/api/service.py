"""What the routes work with: the parts of a running server, opened and closed by the application's lifespan."""

import asyncio
import shlex
from dataclasses import dataclass
from functools import cached_property

from fastapi import Request
from structlog.typing import FilteringBoundLogger

from server.access.keys import KeyRing
from server.access.rates import RateLimits
from server.registry.registry import Registry
from server.serving.engine import Engine
from server.serving.limits import ServingLimits
from server.settings import Settings
from server.telemetry.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Service:
    """One running server; `judging` is held while a version is judged, which takes much of the machine."""

    settings: Settings
    limits: ServingLimits
    registry: Registry
    engine: Engine
    keys: KeyRing
    rates: RateLimits
    metrics: Metrics
    log: FilteringBoundLogger
    judging: asyncio.Lock

    @staticmethod
    def of(request: Request) -> "Service":
        """The service behind a request."""
        service = request.app.state.service
        assert isinstance(service, Service)
        return service

    @cached_property
    def needs_keys(self) -> bool:
        """Whether calls need an API key; looked up once, for every request asks."""
        return self.settings.needs_keys

    @property
    def how_to_import(self) -> str:
        """The command that puts an encoder into the registry; folders are named to callers of this machine only."""
        return import_command("DATA_DIR" if self.needs_keys else self.settings.data_dir)

    @property
    def how_to_promote(self) -> str:
        """The command that lets it serve."""
        return promote_command("DATA_DIR" if self.needs_keys else self.settings.data_dir)


def import_command(folder: object) -> str:
    """How a first encoder is imported: the one that comes with LowSSL, or another in the place of `default`."""
    return f"lowssl registry import default --data-dir {shlex.quote(str(folder))}"


def promote_command(folder: object) -> str:
    """How it is made to serve."""
    return f"lowssl registry promote v1 --data-dir {shlex.quote(str(folder))}"
