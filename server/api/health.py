"""What load balancers, Prometheus and careful clients ask: alive, ready, figures, limits."""

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lowssl_core import __version__
from server.api.answers import TYPES
from server.api.callers import EMBEDDERS
from server.api.descriptions import HEALTHZ, INFO, METRICS, READYZ
from server.api.service import Service
from server.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["operation"])


@router.get("/healthz", **HEALTHZ)
async def healthz(request: Request) -> Response:
    """200 as long as the process answers; needs no key."""
    return _json({"status": "ok"})


@router.get("/readyz", **READYZ)
async def readyz(request: Request) -> Response:
    """200 when a version serves, else 503 and why; needs no key."""
    service = Service.of(request)
    status = service.engine.status
    if status.version is not None:
        return _json({"status": "ready", "version": status.version})
    if status.problem is not None:
        reason = "the version that should serve cannot be loaded; the server's log says why"
    else:
        reason = f"no version serves yet; {service.how_to_import}"
    return _json({"status": "not ready", "reason": reason}, 503)


@router.get("/metrics", dependencies=[EMBEDDERS], **METRICS)
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format: requests and their times by route, images by outcome, the queue, the version.

    Where keys are needed, this needs one, too: Prometheus sends it as `authorization` credentials.
    """
    return Response(Service.of(request).metrics.render(), media_type=CONTENT_TYPE)


@router.get("/info", dependencies=[EMBEDDERS], **INFO)
async def info(request: Request) -> Response:
    """Which version serves, how it sees images, and what is accepted."""
    service = Service.of(request)
    status, limits = service.engine.status, service.limits
    serving = None
    if status.version is not None and (described := status.description) is not None:
        serving = {
            "version": status.version,
            "name": described.name,
            "backbone": described.backbone,
            "dimension": described.width,
            "input_size": described.size,
            "resize": described.resize,
            "precision": described.precision,
            "licence": described.licence,
        }
    return _json(
        {
            "lowssl": __version__,
            "serving": serving,
            "accepts": {
                "images": ["image/jpeg", "image/png", "image/webp"],
                "bodies": ["image/*", "multipart/form-data", "application/json", "application/x-npy"],
                "answers": list(TYPES),
            },
            "limits": {
                "max_body_bytes": limits.max_body_bytes,
                "max_images": limits.max_images,
                "max_pixels_jpeg": limits.jpeg.max_pixels,
                "max_pixels_other": limits.image.max_pixels,
                "min_side": limits.image.min_side,
                "max_side": limits.image.max_side,
                "max_in_flight": limits.max_in_flight,
                "request_seconds": limits.request_seconds,
                "requests_per_minute": service.settings.requests_per_minute,
            },
            "execution": {"kind": status.execution, "workers": status.workers},
        }
    )


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
