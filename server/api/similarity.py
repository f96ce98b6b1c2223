"""`POST /v1/similarity`: how alike images are."""

from typing import Annotated

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lowssl_core.images import BadImage
from server.api.answers import image_errors, version_headers
from server.api.bodies import read_images
from server.api.callers import EMBEDDERS
from server.api.descriptions import SIMILARITY, VERSION
from server.api.embedding import embed_images
from server.api.problems import Problem
from server.api.service import Service

router = APIRouter(tags=["embeddings"])


@router.post("/v1/similarity", dependencies=[EMBEDDERS], **SIMILARITY)
async def compare(request: Request, version: Annotated[str | None, Query(description=VERSION)] = None) -> Response:
    """Compare two or more images, each with each.

    The answer is the matrix of cosine similarities of their embeddings: 1 for the same image. Bodies are those of
    `/embed`; if one image cannot be used, there is no matrix, and status 422 says which.
    """
    service = Service.of(request)
    with service.engine.admit():
        images = await read_images(request, service.limits)
        if len(images) < 2:
            raise Problem(422, "one image; comparing takes two or more")
        embedded, results = await embed_images(request, images, version=version, normalize=True)
    if errors := image_errors(results):
        raise Problem(
            422, f"{len(errors)} of {len(results)} images cannot be used", code="unusable_images", errors=errors
        )
    embeddings = np.stack([result for result in results if not isinstance(result, BadImage)])
    body = {
        "version": embedded.version,
        "dimension": embedded.description.width,
        "similarity": np.clip(embeddings @ embeddings.T, -1, 1),
    }
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=version_headers(embedded), media_type="application/json")
