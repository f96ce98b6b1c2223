"""From a request's body to results, as every route that takes images does it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from lowssl_core.images import BadImage
from server.api.answers import Result, image_code
from server.api.bodies import Image
from server.api.exchange import Exchange
from server.api.service import Service
from server.serving.engine import Embedded


async def embed_images(
    request: Request, images: Sequence[Image], *, version: str | None, normalize: bool
) -> tuple[Embedded, list[Result]]:
    """Which version answered, and one result for each image; a client that leaves cancels what has not started.

    Raises:
        ClientDisconnect: it left.
        NoModel, UnknownVersion, TimedOut: see `Engine.embed`.
    """
    service, exchange = Service.of(request), Exchange.of(request.scope)
    exchange.images = len(images)
    async with _cancelled_by_leaving(request):
        embedded = await service.engine.embed(
            [image for image in images if not isinstance(image, BadImage)], version=version, normalize=normalize
        )
    exchange.version = embedded.version
    found = iter(embedded.results)
    results: list[Result] = [image if isinstance(image, BadImage) else next(found) for image in images]
    bad = [image_code(result) for result in results if isinstance(result, BadImage)]
    if len(bad) < len(results):
        service.metrics.count_images("embedded", len(results) - len(bad))
    for code in bad:
        service.metrics.count_images(code, 1)
    return embedded, results


@asynccontextmanager
async def _cancelled_by_leaving(request: Request) -> AsyncIterator[None]:
    """A block that ends in ClientDisconnect as soon as the client is gone; its body must have been read."""
    task = asyncio.current_task()
    assert task is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if has_left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
