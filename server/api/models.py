"""`/v1/models`: the versions of the encoder, and which of them serves."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from lowssl_core.errors import UserError
from server.api.bodies import read_model
from server.api.callers import EMBEDDERS, OPERATORS
from server.api.descriptions import MODEL, MODELS, PROMOTE, ROLLBACK
from server.api.exchange import Exchange
from server.api.problems import Problem
from server.api.promotion import promote
from server.api.service import Service
from server.registry.version import Event, UnknownVersionError, Version

router = APIRouter(prefix="/v1/models", tags=["models"])

Why = Annotated[str, Field(max_length=2000, description="For the version's history.")]


class RollbackRequest(BaseModel):
    """Why the version before is to serve again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    why: Why = ""


class PromoteRequest(RollbackRequest):
    """Why a version is to serve, and whether it may although the gate refuses it."""

    force: bool = Field(False, description="Let it serve even if the gate refuses it.")


@router.get("", dependencies=[EMBEDDERS], **MODELS)
async def list_models(request: Request) -> Response:
    """All versions, the newest first; those that can be asked for are a model's `id` in OpenAI's shape, too."""
    versions = await asyncio.to_thread(Service.of(request).registry.versions)
    return _json({"object": "list", "data": [_entry(version) for version in reversed(versions)]})


@router.get("/{version}", dependencies=[EMBEDDERS], **MODEL)
async def show_model(request: Request, version: str) -> Response:
    """One version: its description, figures and files, where it came from, and what happened to it."""
    registry = Service.of(request).registry

    def read() -> tuple[Version, list[Event]]:
        return registry.version(version), registry.events(version)

    try:
        found, events = await asyncio.to_thread(read)
    except UnknownVersionError as error:
        raise Problem(404, str(error), code="unknown_version") from None
    return _json(_details(found, events))


@router.post("/{version}/promote", dependencies=[OPERATORS], **PROMOTE)
async def promote_model(request: Request, version: str) -> Response:
    """Judge a version on the probe images and, if the gate passes it, let it serve in place of the one that does.

    This takes as long as the gate does; requests for embeddings go on meanwhile, and none fails at the change.
    """
    service = Service.of(request)
    asked = await read_model(request, PromoteRequest, service.limits)
    try:
        found = await asyncio.to_thread(service.registry.version, version)
    except UnknownVersionError as error:
        raise Problem(404, str(error), code="unknown_version") from None
    if found.state == "serving":
        raise Problem(409, f"{version} serves already")
    promoted, event = await promote(service, version, who=_who(request), why=asked.why, force=asked.force)
    await service.engine.refresh()
    report = None if event.report is None else event.report.as_dict()
    return _json({"version": _entry(promoted), "report": report})


@router.post("/rollback", dependencies=[OPERATORS], **ROLLBACK)
async def roll_back(request: Request) -> Response:
    """Let the version serve again that served before."""
    service = Service.of(request)
    asked = await read_model(request, RollbackRequest, service.limits)
    try:
        version = await asyncio.to_thread(service.registry.rollback, who=_who(request), why=asked.why)
    except UserError as error:
        raise Problem(409, str(error)) from None
    await service.engine.refresh()
    return _json(_entry(version))


def _who(request: Request) -> str:
    return Exchange.of(request.scope).key or "API"


def _entry(version: Version) -> dict[str, Any]:
    """A version in a list: a model of OpenAI's API, and what ours knows of it."""
    return {
        "id": version.name,
        "object": "model",
        "created": int(version.created.timestamp()),
        "owned_by": "lowssl",
        "state": version.state,
        "kind": version.kind,
        "parent": version.parent,
        "name": version.description.name,
        "backbone": version.description.backbone,
        "dimension": version.description.width,
        "can_serve": "onnx" in version.files,
    }


def _details(version: Version, events: list[Event]) -> dict[str, Any]:
    return {
        **_entry(version),
        "description": asdict(version.description),
        "files": {role: asdict(file) for role, file in version.files.items()},
        "metrics": version.metrics,
        "facts": version.facts,
        "events": [
            {
                "time": event.time,
                "action": event.action,
                "who": event.who,
                "why": event.why,
                "report": None if event.report is None else event.report.as_dict(),
            }
            for event in events
        ],
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
