"""The OpenAPI description: for each route its bodies, answers and errors, with examples that can be tried."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from server.access.keys import Role
from server.api.problems import CODES, MEDIA_TYPE
from server.api.schemas import COMPONENTS, Schema, ref

# Two PNG files of 16 x 16 pixels, one orange, one blue.
_ORANGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAAA1BMVEXIUCi3yA+MAAAADElEQVR42mNgIA0AAAAwAAEodEl9AAAAAElFTkSuQmCC"
)
_BLUE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAAA1BMVEUoWshEz9XeAAAADElEQVR42mNgIA0AAAAwAAEodEl9AAAAAElFTkSuQmCC"
)
_BINARY: Schema = {"type": "string", "format": "binary"}

_ERRORS = {
    400: ("Not of the shape that this route takes", "model must be a text: 'lowssl' or a version's name"),
    401: ("No API key where one is needed, or one that is not known", "this API key is not known, or was revoked"),
    403: ("The key's role is not enough", "this takes a key of the role operate; this key's is embed"),
    404: ("No such version or device", "there is no version v9: the registry has v1 to v3"),
    406: ("None of the types in Accept can be had", "Accept text/html; there are application/json, ..."),
    408: ("The body was not sent in time", "the body was not sent within 10 s"),
    409: ("Not possible now", "v3 serves already"),
    413: ("Too many bytes, images or pixels", "the body is larger than 10,000,000 bytes"),
    415: ("No image, or a body of a kind that is not accepted", "the image cannot be used: unreadable"),
    422: ("The body or a parameter is not as it should be", "the body holds no image"),
    429: ("Too many requests of this key; Retry-After says when to come back", "more than 600 requests a minute"),
    500: ("A fault of the server; its log has more under the request_id", "something went wrong here"),
    503: ("No place is free, or no version serves yet; Retry-After says when to come back", "the server is busy"),
}
_CODES = {404: "unknown_version", 415: "unreadable", 503: "overloaded"}  # more exact ones
_RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_VERSION_HEADERS = {
    "X-Lowssl-Version": {"description": "Which version answered.", "schema": {"type": "string"}},
    "X-Lowssl-Dimension": {"description": "How long its embeddings are.", "schema": {"type": "integer"}},
}
# An empty requirement: on loopback no key is needed.
_KEYS: list[Schema] = [{"bearer": []}, {"apiKey": []}, {}]
_UPLOAD = (401, 403, 404, 408, 413, 415, 422, 429, 500, 503)


def _content(media_type: str, schema: Schema, examples: Mapping[str, Any] | None = None) -> Schema:
    entry: Schema = {"schema": schema}
    if examples:
        entry["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {media_type: entry}


def _problems(*statuses: int) -> dict[int | str, Any]:
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> Schema:
    description, detail = _ERRORS[status]
    example = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": _CODES.get(status, CODES[status]),
        "request_id": "9f86d081884c7d65",
    }
    response = {"description": description, "content": _content(MEDIA_TYPE, ref("Problem"), {"problem": example})}
    return response | ({"headers": _RETRY} if status in (429, 503) else {})


def _route(
    summary: str,
    *,
    role: Role | None = "embed",
    answer: Schema,
    problems: tuple[int, ...],
    body: Schema | None = None,
    headers: Schema | None = None,
    parameters: list[Schema] | None = None,
    description: str = "The answer",
) -> dict[str, Any]:
    """What `APIRouter.get` and `.post` take to describe a route; that it asks for the role is the route's business."""
    ok: Schema = {"description": description, "content": answer} | ({"headers": headers} if headers else {})
    route: dict[str, Any] = {
        "summary": summary,
        "response_class": Response,
        "responses": {200: ok, **_problems(*problems)},
    }
    extra: Schema = {} if role is None else {"x-role": role, "security": _KEYS}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": body}
    if parameters is not None:
        extra["parameters"] = parameters
    return route | {"openapi_extra": extra}


_IMAGE_BODIES: Schema = {
    "image/jpeg": {"schema": _BINARY},
    "image/png": {"schema": _BINARY},
    "image/webp": {"schema": _BINARY},
    "application/octet-stream": {"schema": _BINARY},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1}},
            "required": ["images"],
            "description": "Files, in fields of any name.",
        }
    },
    **_content(
        "application/json", ref("Images"), {"two images": {"images": [_ORANGE, f"data:image/png;base64,{_BLUE}"]}}
    ),
    "application/x-npy": {"schema": _BINARY | {"description": "A numpy array: uint8, (H, W, 3) or (N, H, W, 3), RGB."}},
}
_EMBEDDINGS_EXAMPLE = {
    "version": "v3",
    "dimension": 4,
    "normalized": True,
    "embeddings": [
        {"index": 0, "embedding": [0.5, 0.5, -0.5, 0.5]},
        {"index": 1, "error": {"code": "truncated", "message": "truncated"}},
    ],
}


def _parameter(name: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


VERSION = "A version of the encoder, such as v3; without it the one that serves."
# Of the route that is called most: FastAPI's own reading of parameters would cost a third of what HTTP does.
_EMBED_PARAMETERS = [
    _parameter("version", {"type": "string"}, VERSION),
    _parameter(
        "normalize",
        {"type": "boolean", "default": True},
        "Embeddings of length 1, or the encoder's features as they are.",
    ),
    _parameter(
        "encoding",
        {"type": "string", "enum": ["float", "base64"], "default": "float"},
        "In JSON: lists of numbers, or base64 of little-endian float32, which is smaller.",
    ),
]

EMBED = _route(
    "Embed images",
    body=_IMAGE_BODIES,
    parameters=_EMBED_PARAMETERS,
    answer={
        **_content("application/json", ref("Embeddings"), {"one of two": _EMBEDDINGS_EXAMPLE}),
        "application/x-npy": {
            "schema": _BINARY | {"description": "float32 (N, dimension); only if all images are good."}
        },
        "application/msgpack": {
            "schema": _BINARY | {"description": "The same as in JSON; an embedding is bytes of little-endian float32."}
        },
    },
    headers=_VERSION_HEADERS,
    problems=(*_UPLOAD, 406),
    description="For each image its embedding, or its own error",
)
SIMILARITY = _route(
    "Compare images",
    body=_IMAGE_BODIES,
    answer=_content(
        "application/json",
        ref("Similarity"),
        {"two": {"version": "v3", "dimension": 256, "similarity": [[1.0, 0.31], [0.31, 1.0]]}},
    ),
    headers=_VERSION_HEADERS,
    problems=_UPLOAD,
    description="The matrix of cosine similarities",
)
OPENAI = _route(
    "Embed images, in OpenAI's shape",
    body=_content(
        "application/json",
        ref("OpenAIRequest"),
        {"one image": {"model": "lowssl", "input": f"data:image/png;base64,{_BLUE}"}},
    ),
    answer=_content("application/json", ref("OpenAIEmbeddings")),
    headers=_VERSION_HEADERS,
    problems=(),
    description="The embeddings",
)
OPENAI["responses"] |= {
    status: {"description": _ERRORS[status][0], "content": _content("application/json", ref("OpenAIError"))}
    for status in (400, *_UPLOAD)
}
_READING = (401, 403, 429, 500)
MODELS = _route("List the versions", answer=_content("application/json", ref("Models")), problems=(*_READING, 503))
MODEL = _route(
    "Show a version", answer=_content("application/json", ref("ModelDetails")), problems=(*_READING, 404, 422, 503)
)
_CHANGING = (*_READING, 408, 409, 413, 415, 422, 503)
PROMOTE = _route(
    "Let a version serve, if the gate passes it",
    role="operate",
    body=_content("application/json", ref("PromoteRequest"), {"why": {"why": "better on the new scenes"}}),
    answer=_content("application/json", ref("Promotion")),
    problems=(*_CHANGING, 404),
    description="It serves",
)
ROLLBACK = _route(
    "Let the version before serve again",
    role="operate",
    body=_content("application/json", ref("RollbackRequest"), {"why": {"why": "worse on the night shift's images"}}),
    answer=_content("application/json", ref("Model")),
    problems=_CHANGING,
    description="This version serves again",
)
_JOINING = {
    "token": "lowssl-join-9f86d081884c-" + "0" * 64,
    "public_key": "ecdsa-sha2-nistp384 AAAA...",
    "name": "kitchen",
}
_NEWS = {"new_images": 120, "time": "2026-01-31T12:00:00+00:00", "signature": "MGUCMQ=="}
JOIN = _route(
    "Let a device join",
    role=None,
    body=_content("application/json", ref("JoinRequest"), {"a device": _JOINING}),
    answer=_content("application/json", ref("Joined")),
    problems=(401, 408, 413, 415, 422, 500, 503),
    description="It has joined",
)
JOIN["responses"][201] = JOIN["responses"].pop(200)
JOIN["responses"][409] = {
    "description": "This key has joined before, which is as good",
    "content": _content("application/json", ref("Joined")),
}
JOIN["status_code"] = 201
NEWS = _route(
    "Hear how many new images a device has",
    role=None,
    body=_content("application/json", ref("NewsRequest"), {"120 images": _NEWS}),
    answer=_content("application/json", ref("Heard")),
    problems=(401, 408, 413, 415, 422, 500, 503),
)
FEDERATION = _route(
    "How the federation stands",
    role="operate",
    answer=_content("application/json", ref("FederationStatus")),
    problems=(*_READING, 503),
)
DEVICES = _route(
    "List the devices",
    role="operate",
    answer=_content("application/json", ref("Devices")),
    problems=(*_READING, 503),
)
HISTORY = _route(
    "List the last rounds",
    role="operate",
    answer=_content("application/json", ref("Rounds")),
    problems=(*_READING, 503),
)
ORDER = _route(
    "Order rounds",
    role="operate",
    body=_content("application/json", ref("OrderRequest"), {"two": {"rounds": 2}}),
    answer=_content("application/json", ref("FederationStatus")),
    problems=_CHANGING,
)
STOP = _route(
    "Stop ordering, and the round under way",
    role="operate",
    body=_content("application/json", ref("Nothing"), {"nothing": {}}),
    answer=_content("application/json", ref("FederationStatus")),
    problems=_CHANGING,
)
RELEASE = _route(
    "Take a device out of quarantine, with the next round",
    role="operate",
    body=_content("application/json", ref("Nothing"), {"nothing": {}}),
    answer=_content("application/json", ref("Released")),
    problems=(*_CHANGING, 404),
)
HEALTHZ = _route(
    "Is the process alive?", role=None, answer=_content("application/json", ref("Health")), problems=(500,)
)
READYZ = _route("Does a version serve?", role=None, answer=_content("application/json", ref("Ready")), problems=(500,))
READYZ["responses"][503] = {"description": "Not ready", "content": _content("application/json", ref("NotReady"))}
METRICS = _route("Figures for Prometheus", answer=_content("text/plain", {"type": "string"}), problems=_READING)
INFO = _route("What serves, and the limits", answer=_content("application/json", ref("Info")), problems=_READING)


def describe(app: FastAPI) -> Schema:
    """The OpenAPI description of the application, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=_TAGS
        )
        components = schema.setdefault("components", {})
        components["schemas"] = COMPONENTS
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of `lowssl keys create`."},
            "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        app.openapi_schema = schema
    return app.openapi_schema


def routes_table(description: Schema) -> str:
    """The routes as a Markdown table, for the documentation."""
    lines = ["| | | Role of the key |", "|---|---|---|"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            role = operation.get("x-role", "none needed")
            lines.append(f"| `{method.upper()} {path}` | {operation['summary']} | {role} |")
    return "\n".join(lines)


_TAGS = [
    {"name": "embeddings", "description": "Images in, vectors out."},
    {"name": "models", "description": "Versions of the encoder, and which one serves."},
    {"name": "federation", "description": "Devices that train the encoder on, where the federation is on."},
    {"name": "operation", "description": "Health, figures, limits."},
]
