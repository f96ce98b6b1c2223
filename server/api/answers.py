"""Embeddings to an answer: JSON with floats or base64, npy or MessagePack, as the client accepts."""

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import msgpack
import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from lowssl_core.images import BadImage
from server.api.bodies import BadReference
from server.api.problems import Problem
from server.serving.engine import Embedded
from server.serving.errors import UnknownFormat

Encoding = Literal["float", "base64"]
Result = NDArray[np.float32] | BadImage

JSON, NPY, MSGPACK = "application/json", "application/x-npy", "application/msgpack"
TYPES = (JSON, NPY, MSGPACK)


def choose_type(accept: str | None) -> str:
    """The first of the types that we have in the client's order of preference; Problem 406 if there is none."""
    if accept is None or accept in ("*/*", JSON):
        return JSON
    wanted = []
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            wanted.append((float(weight), name))
        except ValueError:
            wanted.append((0.0, name))
    for quality, name in sorted(wanted, key=lambda one: -one[0]):
        for offered in TYPES:
            if quality > 0 and name in (offered, "*/*", offered.partition("/")[0] + "/*", "application/x-msgpack"):
                return MSGPACK if name == "application/x-msgpack" else offered
    raise Problem(406, f"Accept {accept}; there are {', '.join(TYPES)}")


def answer(
    embedded: Embedded, results: Sequence[Result], *, media_type: str, encoding: Encoding, normalize: bool
) -> Response:
    """The answer to `/embed`.

    Raises:
        Problem: 415, 413 or 422 if the one image there is has no embedding, or, for npy, if any has none.
    """
    errors = image_errors(results)
    if len(results) == 1 and errors:
        raise _problem_of_one(results[0])
    if media_type == NPY:
        content = _npy(results, errors)
    else:
        as_bytes = media_type == MSGPACK
        body = {
            "version": embedded.version,
            "dimension": embedded.description.width,
            "normalized": normalize,
            "embeddings": [_entry(index, result, encoding, as_bytes) for index, result in enumerate(results)],
        }
        content = msgpack.packb(body) if as_bytes else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=version_headers(embedded), media_type=media_type)


def version_headers(embedded: Embedded) -> dict[str, str]:
    """Which version answered, and how long its embeddings are."""
    return {"X-Lowssl-Version": embedded.version, "X-Lowssl-Dimension": str(embedded.description.width)}


def image_errors(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What is wrong with those that have no embedding."""
    return [
        {"index": index, **image_error(result)} for index, result in enumerate(results) if isinstance(result, BadImage)
    ]


def image_error(reason: BadImage) -> dict[str, str]:
    """A word for programs and a sentence for people."""
    return {"code": image_code(reason), "message": reason.reason}


def image_code(reason: BadImage) -> str:
    """The reason's first word, where it is one of the known ones."""
    if isinstance(reason, BadReference):
        return "not_base64" if reason.reason.startswith("not") else "not_fetched"
    if isinstance(reason, UnknownFormat):
        return "unknown_format"
    first = reason.reason.partition(":")[0]
    return _CODES.get(first, "unusable")


_CODES = {
    "empty file": "empty",
    "unreadable": "unreadable",
    "truncated": "truncated",
    "zero-sized": "too_small",
    "tiny": "too_small",
    "huge": "too_large",
}
_STATUSES = {"too_large": 413, "too_small": 422, "not_base64": 422, "not_fetched": 422}


def _problem_of_one(result: Result) -> Problem:
    assert isinstance(result, BadImage)
    code = image_code(result)
    return Problem(_STATUSES.get(code, 415), f"the image cannot be used: {result.reason}", code=code)


def base64_floats(vector: NDArray[np.float32]) -> str:
    """Base64 of little-endian float32."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")


def _entry(index: int, result: Result, encoding: Encoding, as_bytes: bool) -> dict[str, Any]:
    if isinstance(result, BadImage):
        return {"index": index, "error": image_error(result)}
    if as_bytes:
        return {"index": index, "embedding": result.astype("<f4", copy=False).tobytes()}
    return {
        "index": index,
        "embedding": base64_floats(result) if encoding == "base64" else np.ascontiguousarray(result),
    }


def _npy(results: Sequence[Result], errors: list[dict[str, Any]]) -> bytes:
    if errors:
        raise Problem(
            422,
            f"{len(errors)} of {len(results)} images cannot be used, and an array has no place to say so",
            code="unusable_images",
            errors=errors,
        )
    file = io.BytesIO()
    np.save(
        file, np.stack([result for result in results if not isinstance(result, BadImage)]).astype("<f4", copy=False)
    )
    return file.getvalue()
