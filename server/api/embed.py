"""`POST /embed`: images in, embeddings out."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from server.api.answers import Encoding, answer, choose_type
from server.api.bodies import read_images
from server.api.callers import EMBEDDERS
from server.api.descriptions import EMBED
from server.api.embedding import embed_images
from server.api.service import Service

router = APIRouter(tags=["embeddings"])

VersionQuery = Annotated[
    str | None, Query(description="A version of the encoder, such as v3; without it the one that serves.")
]
NormalizeQuery = Annotated[bool, Query(description="Embeddings of length 1, or the encoder's features as they are.")]
EncodingQuery = Annotated[
    Encoding, Query(description="In JSON: lists of numbers, or base64 of little-endian float32, which is smaller.")
]


@router.post("/v1/embed", include_in_schema=False, dependencies=[EMBEDDERS])
@router.post("/embed", dependencies=[EMBEDDERS], **EMBED)
async def embed(
    request: Request, version: VersionQuery = None, normalize: NormalizeQuery = True, encoding: EncodingQuery = "float"
) -> Response:
    """Embed one image or many.

    The answer names the version that gave it, and has for each image its embedding or its own error. If there is one
    image only and it cannot be used, the status says so: 415, or 413 for too many pixels. `/v1/embed` is the same.
    """
    service = Service.of(request)
    media_type = choose_type(request.headers.get("accept"))
    with service.engine.admit():
        images = await read_images(request, service.limits)
        embedded, results = await embed_images(request, images, version=version, normalize=normalize)
    return answer(embedded, results, media_type=media_type, encoding=encoding, normalize=normalize)
