"""`/v1/federation` for its operators, and `/v1/devices`, by which devices join and tell of new images."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from lowssl_core.errors import UserError
from server.api.bodies import read_model
from server.api.callers import OPERATORS
from server.api.descriptions import DEVICES, FEDERATION, HISTORY, JOIN, NEWS, ORDER, RELEASE, STOP
from server.api.exchange import Exchange
from server.api.federating import Federating
from server.api.problems import Problem
from server.api.service import Service
from server.federation import orders
from server.federation.fleet import fleet_route
from server.federation.joins import BadNewsError, BadTokenError, hear, join, list_devices
from server.federation.overview import device_rows, has_begun, order_rounds, round_rows, status_of
from server.federation.site import fingerprint, kept_certificate
from server.federation.superlink import SuperLinkError

router = APIRouter(tags=["federation"])
fleet = fleet_route(lambda request: Federating.of(request).passage)

_STRICT = ConfigDict(extra="forbid", strict=True)


class JoinRequest(BaseModel):
    """A device that wants to join."""

    model_config = _STRICT

    token: Annotated[str, Field(max_length=200)]
    public_key: Annotated[str, Field(max_length=1000)]
    name: Annotated[str, Field(max_length=100)] = ""


class NewsRequest(BaseModel):
    """How many images a device has not learned from yet, signed by it."""

    model_config = _STRICT

    new_images: Annotated[int, Field(ge=0, le=10**9)]
    time: Annotated[str, Field(max_length=40)]
    signature: Annotated[str, Field(max_length=300)]


class OrderRequest(BaseModel):
    """How many rounds to run."""

    model_config = _STRICT

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 1


class Nothing(BaseModel):
    """An empty object: what asks for a change is JSON, which no form of a web page can send."""

    model_config = _STRICT


@router.post("/v1/devices", **JOIN)
async def join_device(request: Request) -> Response:
    """Let a device in by a token; its key is what it is known by from then on. Takes no API key."""
    service, federating = Service.of(request), Federating.of(request)
    asked = await read_model(request, JoinRequest, service.limits)

    async with federating.joining:  # Flower is told of one at a time
        try:
            device, is_new = await asyncio.to_thread(
                join,
                service.registry.database,
                token=asked.token,
                public_key=asked.public_key,
                name=asked.name,
                register=federating.register,
            )
        except BadTokenError as error:
            raise Problem(401, str(error)) from None
        except SuperLinkError as error:
            service.log.error("a device cannot join", reason=str(error))
            raise Problem(503, "the federation is not up; try again", headers={"Retry-After": "5"}) from None
        except UserError as error:
            raise _trouble(error) from None
    Exchange.of(request.scope).key = device.name
    return _json({"device": device.id, "name": device.name, "address": None}, 201 if is_new else 409)


@router.post("/v1/devices/{device}/news", **NEWS)
async def hear_news(request: Request, device: str) -> Response:
    """Hear how many images a device has that it has not learned from: rounds may be ordered by that."""
    service = Service.of(request)
    asked = await read_model(request, NewsRequest, service.limits)
    try:
        await asyncio.to_thread(hear, service.registry.database, device=device, **asked.model_dump())
    except BadNewsError as error:
        raise Problem(401, str(error)) from None
    return _json({"device": device, "new_images": asked.new_images})


@router.get("/v1/federation", dependencies=[OPERATORS], **FEDERATION)
async def show_federation(request: Request) -> Response:
    """What it is doing, how many rounds are done and ordered, who is in quarantine."""
    return await _status(request)


@router.get("/v1/federation/devices", dependencies=[OPERATORS], **DEVICES)
async def show_devices(request: Request) -> Response:
    """The devices that have joined, and whether they are online."""
    service, federating = Service.of(request), Federating.of(request)

    def read() -> list[dict[str, Any]]:
        try:
            online = {device.node: device.status for device in federating.federation.superlink.devices()}
        except SuperLinkError:
            online = None
        return device_rows(list_devices(service.registry.database), online, federating.folder)

    return _json({"devices": await asyncio.to_thread(read)})


@router.get("/v1/federation/history", dependencies=[OPERATORS], **HISTORY)
async def show_history(request: Request) -> Response:
    """The last hundred rounds, the newest first: devices, rejections and their reasons, bytes, versions."""
    service, folder = Service.of(request), Federating.of(request).folder
    rows = await asyncio.to_thread(lambda: round_rows(folder, service.registry.versions()))
    return _json({"rounds": rows})


@router.post("/v1/federation/rounds", dependencies=[OPERATORS], **ORDER)
async def order(request: Request) -> Response:
    """Order so many rounds beyond those ordered already; a federation that was stopped goes on."""
    asked = await read_model(request, OrderRequest, Service.of(request).limits)
    return await _change(request, lambda folder: order_rounds(folder, asked.rounds))


@router.post("/v1/federation/stop", dependencies=[OPERATORS], **STOP)
async def stop(request: Request) -> Response:
    """Stop until rounds are ordered again; a round under way is given up, and what it has not completed is not lost."""
    await read_model(request, Nothing, Service.of(request).limits)
    return await _change(request, orders.stop)


@router.post("/v1/federation/devices/{device}/release", dependencies=[OPERATORS], **RELEASE)
async def release(request: Request, device: str) -> Response:
    """Take a device out of quarantine; it is asked again from the next round on."""
    service, federating = Service.of(request), Federating.of(request)
    await read_model(request, Nothing, service.limits)
    known = await asyncio.to_thread(list_devices, service.registry.database)
    if device not in {one.id for one in known}:
        raise Problem(404, "no device of this id has joined", code="unknown_device")
    await asyncio.to_thread(orders.release, federating.folder, device)
    return _json({"device": device})


async def _change(request: Request, change: Callable[[Any], object]) -> Response:
    folder = Federating.of(request).folder
    if not await asyncio.to_thread(has_begun, folder):
        raise Problem(409, "no federation has begun; `lowssl federation start` begins one", code="not_begun")
    await asyncio.to_thread(change, folder)
    return await _status(request)


async def _status(request: Request) -> Response:
    service, folder = Service.of(request), Federating.of(request).folder

    def read() -> dict[str, Any]:
        certificate = kept_certificate(folder, service.settings.tls_certificate)
        shown = "" if certificate is None else fingerprint(certificate)
        return status_of(folder, list_devices(service.registry.database)) | {"fingerprint": shown}

    return _json(await asyncio.to_thread(read))


def _trouble(error: UserError) -> Exception:
    """What the device can mend is its problem; a database out of reach is not."""
    from server.database.engine import DatabaseUnavailableError

    return error if isinstance(error, DatabaseUnavailableError) else Problem(422, str(error))


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
