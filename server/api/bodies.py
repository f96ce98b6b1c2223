"""A request's body to its images: multipart, the image itself, base64 in JSON, or a numpy array; nothing is fetched."""

import asyncio
import binascii
import io
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Request
from numpy.lib import format as npy
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lowssl_core.images import BadImage, Pixels
from server.api.problems import Problem
from server.serving.limits import ServingLimits

Model = TypeVar("Model", bound=BaseModel)
Image = bytes | Pixels | BadImage
"""A file's bytes, pixels (H, W, 3), or why not even these could be had."""

ACCEPTED = (
    "image/jpeg, image/png, image/webp or application/octet-stream (one image), multipart/form-data (files), "
    'application/json ({"images": [base64, ...]}), application/x-npy (uint8, (H, W, 3) or (N, H, W, 3))'
)
ARRAY_TYPES = ("application/x-npy", "application/x-numpy", "application/npy")

# From here on decoding base64 takes so long that other requests should not wait for it.
_LONG_BODY = 200_000
_MAX_PART_HEADER = 4096


class BadReference(BadImage):
    """Text in the place of an image that is no base64: an address, or something else."""


async def read_images(request: Request, limits: ServingLimits) -> list[Image]:
    """The images of a request's body, at least one.

    Raises:
        Problem: 413 too large or too many, 415 of another kind, 422 not what its type says, 408 not sent in time.
        ClientDisconnect: the client left.
    """
    content_type, parameters = parse_options_header(request.headers.get("content-type"))
    kind = content_type.decode("latin-1").lower()
    _check_type(request, kind)
    body = await read_body(request, limits)
    if kind == "application/json":
        return await read_base64(_images_field(read_json(body)), limits)
    if kind == "multipart/form-data":
        images: Sequence[Image] = _files(body, parameters.get(b"boundary", b""), limits)
    elif kind in ARRAY_TYPES:
        images = _arrays(body, limits)
    else:
        images = [body] if body else []
    if not images:
        raise Problem(422, f"the body holds no image; accepted: {ACCEPTED}")
    return list(images)


async def read_body(request: Request, limits: ServingLimits) -> bytes:
    """The whole body, unless it is too large: then reading stops. See `read_images` for what is raised."""
    too_large = f"the body is larger than {limits.max_body_bytes:,} bytes"
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.max_body_bytes:
        raise Problem(413, too_large)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.request_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body_bytes:
                    raise Problem(413, too_large)
                chunks.append(chunk)
    except TimeoutError:
        slow = f"the body was not sent within {limits.request_seconds:g} s"
        raise Problem(408, slow, headers={"Connection": "close"}) from None
    return b"".join(chunks)


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object; Problem 422 for anything else."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(422, f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise Problem(422, "the body's JSON is no object")
    return content


async def read_model(request: Request, model: type[Model], limits: ServingLimits) -> Model:
    """A JSON body as a model of pydantic's; Problem 415 for another type, 422 for what the model does not accept."""
    # No form of a web page can send JSON, so none can make a visitor's browser change anything.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, f"send application/json with {', '.join(model.model_fields) or 'an empty object, {}'}")
    content = read_json(await read_body(request, limits))
    try:
        return model.model_validate(content)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise Problem(422, f"{said}; accepted: {', '.join(model.model_fields)}") from None


async def read_base64(texts: Sequence[str], limits: ServingLimits) -> list[Image]:
    """Images from base64 or data: URLs, without holding up others; Problem 413 for too many, 422 for none."""
    check_count(len(texts), limits)
    if sum(map(len, texts)) > _LONG_BODY:
        return await asyncio.to_thread(lambda: [_decode(text) for text in texts])
    return [_decode(text) for text in texts]


def check_count(count: int, limits: ServingLimits) -> None:
    """Raise Problem unless so many images are accepted."""
    if count == 0:
        raise Problem(422, "the list of images is empty")
    if count > limits.max_images:
        raise Problem(413, f"{count} images; a request may hold {limits.max_images}")


def _check_type(request: Request, kind: str) -> None:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Problem(415, f"Content-Encoding {encoding}: send the body as it is")
    # Without a type it is taken for an image: what it is in truth shows when it is decoded.
    known = ("", "application/octet-stream", "application/json", "multipart/form-data", *ARRAY_TYPES)
    if kind not in known and not kind.startswith("image/"):
        raise Problem(415, f"Content-Type {kind}; accepted: {ACCEPTED}")


def _images_field(content: dict[str, Any]) -> list[str]:
    images = content.get("images")
    if set(content) != {"images"} or not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise Problem(422, 'expected {"images": [...]} with base64 or data: URLs, and nothing else')
    return images


def _decode(text: str) -> Image:
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            return BadReference("not base64: a data: URL must be data:image/...;base64,...")
    elif text[:8].lower().startswith(("http://", "https://")):
        return BadReference("an address: images are not fetched, send the image itself")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # also for text that is not ASCII
        return BadReference("not base64")


def _files(body: bytes, boundary: bytes, limits: ServingLimits) -> list[bytes]:
    """The files of a multipart body, in their order; every part must be one."""
    if not boundary:
        raise Problem(422, "multipart/form-data without a boundary")
    files: list[bytes] = []
    chunks: list[bytes] = []
    headers: dict[bytes, bytes] = {}
    name = bytearray()
    value = bytearray()

    def on_part_begin() -> None:
        if len(files) == limits.max_images:
            raise Problem(413, f"more than {limits.max_images} files; a request may hold {limits.max_images}")
        headers.clear()
        chunks.clear()

    def on_header_end() -> None:
        headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def on_headers_finished() -> None:
        _, options = parse_options_header(headers.get(b"content-disposition"))
        kind = headers.get(b"content-type", b"").lower()
        if b"filename" not in options and not kind.startswith((b"image/", b"application/octet-stream")):
            field = options.get(b"name", b"").decode("utf-8", "replace")
            raise Problem(422, f"the field {field!r} is no file; options are given in the address (?normalize=false)")

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": on_part_begin,
            "on_header_field": lambda data, start, end: name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: value.extend(data[start:end]),
            "on_header_end": on_header_end,
            "on_headers_finished": on_headers_finished,
            "on_part_data": lambda data, start, end: chunks.append(data[start:end]),
            "on_part_end": lambda: files.append(b"".join(chunks)),
        },
        max_header_size=_MAX_PART_HEADER,
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem(422, f"the body is no multipart/form-data: {error}") from None
    return files


def _arrays(body: bytes, limits: ServingLimits) -> list[Pixels]:
    """The images of an npy file; its header is read and held against the body before anything is made of it."""
    file = io.BytesIO(body)
    try:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read_header(file)
    except (ValueError, KeyError, EOFError):
        raise Problem(422, "the body is no npy file of version 1 or 2") from None
    if dtype != np.uint8 or is_fortran or len(shape) not in (3, 4) or shape[-1] != 3:
        order = ", column by column" if is_fortran else ""
        raise Problem(422, f"the array is {dtype} {shape}{order}; expected uint8 (H, W, 3) or (N, H, W, 3), row by row")
    check_count(shape[0] if len(shape) == 4 else 1, limits)
    size, start = math.prod(shape), file.tell()
    if size != len(body) - start or size == 0:
        raise Problem(422, f"the array {shape} takes {size:,} bytes; the body has {len(body) - start:,}")
    array = np.frombuffer(body, np.uint8, offset=start).reshape(shape)
    return list(array) if array.ndim == 4 else [array]
