"""`POST /v1/embeddings`: the same in OpenAI's shape, for programs that know it."""

from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lowssl_core.images import BadImage
from server.api.answers import Result, base64_floats, image_errors, version_headers
from server.api.bodies import read_base64, read_body, read_json
from server.api.callers import EMBEDDERS
from server.api.descriptions import OPENAI
from server.api.embedding import embed_images
from server.api.problems import OPENAI_ROUTE, Problem
from server.api.service import Service
from server.serving.engine import Embedded
from server.serving.errors import UnknownVersion

router = APIRouter(tags=["embeddings"])

# The name of whatever version serves.
SERVING = "lowssl"
_KNOWN = {"model", "input", "encoding_format", "dimensions", "user"}


@router.post(OPENAI_ROUTE, dependencies=[EMBEDDERS], **OPENAI)
async def create_embeddings(request: Request) -> Response:
    """Embed images given as base64 or data: URLs in `input`, as OpenAI's clients send text.

    `model` is `lowssl` for the version that serves, or a version's name. All images must be usable: the first that is
    not fails the request. Embeddings have length 1.
    """
    service = Service.of(request)
    with service.engine.admit():
        content = _checked(read_json(await read_body(request, service.limits)))
        texts = [content["input"]] if isinstance(content["input"], str) else content["input"]
        images = await read_base64(texts, service.limits)
        model = content["model"]
        try:
            embedded, results = await embed_images(
                request, images, version=None if model == SERVING else model, normalize=True
            )
        except UnknownVersion:
            known = f"give {SERVING!r} or a version that /v1/models lists"
            raise Problem(404, f"there is no model {model!r}: {known}", code="model_not_found") from None
    if errors := image_errors(results):
        first = errors[0]
        raise Problem(400, f"image {first['index']}: {first['message']}", code=first["code"], errors=errors)
    asked = content.get("dimensions")
    if asked is not None and asked != embedded.description.width:
        raise Problem(400, f"dimensions {asked}: embeddings have {embedded.description.width}, and are not shortened")
    return _answer(embedded, results, content.get("encoding_format", "float"))


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The request's object, if it is of OpenAI's shape; Problem 400 says what is not."""
    if unknown := sorted(set(content) - _KNOWN):
        raise Problem(400, f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(_KNOWN))}")
    if not isinstance(content.get("model"), str):
        raise Problem(400, f"model must be a text: {SERVING!r} or a version's name")
    given = content.get("input")
    if not isinstance(given, str) and not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise Problem(400, "input must be an image in base64 or as a data: URL, or a list of such")
    if content.get("encoding_format", "float") not in ("float", "base64"):
        raise Problem(400, "encoding_format must be float or base64")
    dimensions = content.get("dimensions")
    if dimensions is not None and type(dimensions) is not int:
        raise Problem(400, "dimensions must be a whole number")
    return content


def _answer(embedded: Embedded, results: list[Result], encoding: str) -> Response:
    body = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64_floats(result) if encoding == "base64" else np.ascontiguousarray(result),
            }
            for index, result in enumerate(results)
            if not isinstance(result, BadImage)
        ],
        "model": embedded.version,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=version_headers(embedded), media_type="application/json")
