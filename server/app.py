"""The application: its parts opened and closed by the lifespan, its routes, and what surrounds them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from lowssl_core import __version__
from server.access.keys import KeyRing
from server.access.rates import RateLimits
from server.api import embed, health, models, openai, pages, similarity
from server.api.descriptions import describe
from server.api.exchange import Telemetry
from server.api.problems import fault_response, install_problem_handlers
from server.api.service import Service
from server.registry.registry import Registry, open_registry
from server.registry.version import ONNX, UnknownVersionError, Version
from server.serving.engine import Engine
from server.serving.errors import UnknownVersion
from server.serving.limits import ServingLimits
from server.serving.models import Model
from server.settings import Settings
from server.telemetry.logs import default_format, make_log
from server.telemetry.metrics import Metrics

_DESCRIPTION = """
Images in, embeddings out: vectors of which similar images have similar ones.

Where the server asks for an API key, send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Every answer has an
`X-Request-ID`; send your own to find it again in the server's log. Errors are `application/problem+json`.
"""


def create_app(settings: Settings, *, announce: Callable[[Service], None] = lambda service: None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        settings: all that it is told.
        announce: called when it is ready to answer.
    """
    limits, metrics = _limits(settings), Metrics()
    log = make_log(settings.log_format or default_format())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        registry = await asyncio.to_thread(open_registry, settings)
        engine = Engine(
            ServedVersions(registry),
            limits,
            workers=settings.workers,
            execution=settings.execution,
            poll_seconds=settings.poll_seconds,
        )
        keys = KeyRing(registry.database)
        app.state.service = service = Service(
            settings=settings,
            limits=limits,
            registry=registry,
            engine=engine,
            keys=keys,
            rates=RateLimits(),
            metrics=metrics,
            log=log,
            judging=asyncio.Lock(),
        )
        try:
            await engine.start()
            metrics.watch(lambda: engine.status)
            async with _federating(app, service):
                announce(service)
                yield
        finally:
            await engine.close()
            await keys.close()
            registry.close()

    app = FastAPI(
        title="LowSSL",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]  # FastAPI's documented way
    install_problem_handlers(app)
    for part in (embed, similarity, openai, models, health, pages):
        app.include_router(part.router)
    if settings.federation:
        from server.api import federation  # what it takes is not needed elsewhere

        app.include_router(federation.router)
        app.router.routes.append(federation.fleet)
    pages.mount_static_files(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Lowssl-Version", "X-Lowssl-Dimension", "X-Request-ID"],
        )
    app.add_middleware(Telemetry, metrics=metrics, log=log, fault=fault_response, max_body_bytes=limits.max_body_bytes)
    return app


@asynccontextmanager
async def _federating(app: FastAPI, service: Service) -> AsyncIterator[None]:
    """The federation, where it is on."""
    if not service.settings.federation:
        yield
        return
    from server.api.federating import Federating

    app.state.federating = federating = await asyncio.to_thread(Federating, service)
    await federating.start()
    try:
        yield
    finally:
        await federating.close()


class ServedVersions:
    """The registry as the engine sees it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # A version's file never changes, and fetching it reads all of it to check its hash.
        self._paths: dict[str, Path] = {}

    def serving(self) -> Model | None:
        """The version that serves, with a local file."""
        version = self._registry.serving()
        return None if version is None else self._model(version)

    def find(self, version: str) -> Model:
        """The version of that name; UnknownVersion if there is none, or it has no file any more."""
        try:
            found = self._registry.version(version)
        except UnknownVersionError as error:
            raise UnknownVersion(str(error)) from None
        if ONNX not in found.files:
            raise UnknownVersion(f"{version} cannot be served any more: its file was pruned")
        return self._model(found)

    def _model(self, version: Version) -> Model:
        path = self._paths.get(version.name)
        if path is None or not path.exists():
            path = self._paths[version.name] = self._registry.fetch(version)
        return Model(version.name, path)


def _limits(settings: Settings) -> ServingLimits:
    """The settings of these names."""
    return ServingLimits(**{field.name: getattr(settings, field.name) for field in fields(ServingLimits)})
