"""`POST /embed`: images in, embeddings out."""

from typing import get_args

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answers import Encoding, answer, choose_type
from server.api.bodies import read_images
from server.api.callers import check_caller
from server.api.descriptions import EMBED
from server.api.embedding import embed_images
from server.api.problems import Problem
from server.api.service import Service

router = APIRouter(tags=["embeddings"])

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@router.post("/v1/embed", include_in_schema=False)
@router.post("/embed", **EMBED)
async def embed(request: Request) -> Response:
    """Embed one image or many.

    The answer names the version that gave it, and has for each image its embedding or its own error. If there is one
    image only and it cannot be used, the status says so: 415, or 413 for too many pixels. `/v1/embed` is the same.
    """
    await check_caller(request, "embed")
    service = Service.of(request)
    media_type = choose_type(request.headers.get("accept"))
    version, normalize, encoding = _options(request)
    with service.engine.admit():
        images = await read_images(request, service.limits)
        embedded, results = await embed_images(request, images, version=version, normalize=normalize)
    return answer(embedded, results, media_type=media_type, encoding=encoding, normalize=normalize)


def _options(request: Request) -> tuple[str | None, bool, Encoding]:
    """The query's version, normalize and encoding; Problem 422 for a value that is none."""
    query = request.query_params
    normalize = query.get("normalize", "true").lower()
    if normalize not in _BOOLEANS:
        raise Problem(422, f"normalize: {normalize!r} is neither true nor false")
    encoding = query.get("encoding", "float")
    for known in get_args(Encoding):
        if encoding == known:
            return query.get("version"), _BOOLEANS[normalize], known
    raise Problem(422, f"encoding: {encoding!r} is neither float nor base64")
