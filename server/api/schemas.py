"""JSON Schemas of what the API takes and gives: the components of its OpenAPI description."""

from typing import Any

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """A reference to a component."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, *, optional: tuple[str, ...] = (), description: str = "") -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }
    return schema | ({"description": description} if description else {})


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(kind: str) -> Schema:
    return {"type": [kind, "null"]}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_POSITIVE: Schema = {"type": "integer", "minimum": 1}
_NUMBER: Schema = {"type": "number"}
_ANY: Schema = {"type": "object"}
_VECTOR: Schema = {
    "oneOf": [_array(_NUMBER), {"type": "string", "description": "base64 of little-endian float32"}],
}
_IMAGE_TEXT: Schema = {"type": "string", "description": "An image in base64, or a data: URL. Nothing is fetched."}

_IMAGE_ERROR = _object(
    {
        "code": {"type": "string", "description": "A word for programs: unreadable, truncated, too_large, ..."},
        "message": {"type": "string", "description": "A sentence for people."},
    }
)

_MODEL = {
    "id": {"type": "string", "description": "v1, v2 ..."},
    "object": {"const": "model"},
    "created": {"type": "integer", "description": "Seconds since 1970."},
    "owned_by": {"const": "lowssl"},
    "state": {"enum": ["candidate", "serving", "refused", "retired"]},
    "kind": {"enum": ["pretrained", "federated", "imported"]},
    "parent": _or_null("string"),
    "name": _TEXT,
    "backbone": _TEXT,
    "dimension": _POSITIVE,
    "can_serve": {"type": "boolean", "description": "False after its file was pruned."},
}
_EVENT = _object(
    {"time": {"type": "string", "format": "date-time"}, "action": _TEXT, "who": _TEXT, "why": _TEXT}
    | {"report": {"type": ["object", "null"], "description": "What the gate found."}}
)

COMPONENTS: dict[str, Schema] = {
    "Problem": _object(
        {
            "type": {"const": "about:blank"},
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": {"type": "string", "description": "What was given, and what is accepted."},
            "code": {"type": "string", "description": "A word for programs."},
            "request_id": {"type": "string", "description": "Under which the server's log knows the request."},
            "errors": _array(_object({"index": _COUNT, "code": _TEXT, "message": _TEXT})),
        },
        optional=("errors",),
        description="An error, as RFC 9457 has it.",
    ),
    "OpenAIError": _object(
        {
            "error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null("string"), "code": _TEXT}),
            "request_id": _TEXT,
        }
    ),
    "Images": _object({"images": _array(_IMAGE_TEXT, minItems=1)}),
    "Embeddings": _object(
        {
            "version": {"type": "string", "description": "Which version of the encoder answered."},
            "dimension": _POSITIVE,
            "normalized": {"type": "boolean", "description": "Whether embeddings have length 1."},
            "embeddings": _array(
                {
                    "oneOf": [
                        _object({"index": _COUNT, "embedding": _VECTOR}),
                        _object({"index": _COUNT, "error": _IMAGE_ERROR}),
                    ]
                },
                description="One for each image, in the request's order.",
            ),
        }
    ),
    "Similarity": _object(
        {
            "version": _TEXT,
            "dimension": _POSITIVE,
            "similarity": _array(
                _array({"type": "number", "minimum": -1, "maximum": 1}),
                description="Row i, column j: the cosine similarity of images i and j.",
            ),
        }
    ),
    "OpenAIRequest": _object(
        {
            "model": {"type": "string", "description": "lowssl for the version that serves, or a version's name."},
            "input": {"oneOf": [_IMAGE_TEXT, _array(_IMAGE_TEXT, minItems=1)]},
            "encoding_format": {"enum": ["float", "base64"], "default": "float"},
            "dimensions": {"type": "integer", "description": "Only the encoder's own is accepted."},
            "user": _TEXT,
        },
        optional=("encoding_format", "dimensions", "user"),
    ),
    "OpenAIEmbeddings": _object(
        {
            "object": {"const": "list"},
            "data": _array(_object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": _VECTOR})),
            "model": {"type": "string", "description": "Which version of the encoder answered."},
            "usage": _object({"prompt_tokens": {"const": 0}, "total_tokens": {"const": 0}}),
        }
    ),
    "Model": _object(_MODEL),
    "Models": _object({"object": {"const": "list"}, "data": _array(ref("Model"))}),
    "ModelDetails": _object(
        _MODEL
        | {
            "description": _ANY,
            "files": {
                "type": "object",
                "additionalProperties": _object({"sha256": _TEXT, "bytes": _COUNT}),
                "description": "By role: onnx is what serves.",
            },
            "metrics": {"type": "object", "additionalProperties": _NUMBER},
            "facts": _ANY,
            "events": _array(_EVENT),
        }
    ),
    "PromoteRequest": _object(
        {
            "why": {"type": "string", "maxLength": 2000, "description": "For the version's history."},
            "force": {"type": "boolean", "description": "Let it serve even if the gate refuses it."},
        },
        optional=("why", "force"),
    ),
    "RollbackRequest": _object({"why": {"type": "string", "maxLength": 2000}}, optional=("why",)),
    "Promotion": _object({"version": ref("Model"), "report": {"type": ["object", "null"]}}),
    "Health": _object({"status": {"const": "ok"}}),
    "Ready": _object({"status": {"const": "ready"}, "version": _TEXT}),
    "NotReady": _object({"status": {"const": "not ready"}, "reason": _TEXT}),
    "Info": _object(
        {
            "lowssl": {"type": "string", "description": "The software's version."},
            "serving": {
                "oneOf": [
                    {"type": "null"},
                    _object(
                        {"version": _TEXT, "name": _TEXT, "backbone": _TEXT, "dimension": _POSITIVE}
                        | {"input_size": _POSITIVE, "resize": _POSITIVE, "precision": _TEXT, "licence": _TEXT}
                    ),
                ]
            },
            "accepts": _object({"images": _array(_TEXT), "bodies": _array(_TEXT), "answers": _array(_TEXT)}),
            "limits": _object(
                {
                    "max_body_bytes": _POSITIVE,
                    "max_images": _POSITIVE,
                    "max_pixels_jpeg": _POSITIVE,
                    "max_pixels_other": _POSITIVE,
                    "min_side": _POSITIVE,
                    "max_side": _POSITIVE,
                    "max_in_flight": _POSITIVE,
                    "request_seconds": _NUMBER,
                    "requests_per_minute": _or_null("integer"),
                }
            ),
            "execution": _object({"kind": {"enum": ["pool", "batches", None]}, "workers": _POSITIVE}),
        }
    ),
    "Nothing": _object({}, description="An empty object."),
    "JoinRequest": _object(
        {
            "token": {"type": "string", "maxLength": 200, "description": "As `lowssl federation token` printed it."},
            "public_key": {"type": "string", "maxLength": 1000, "description": "The device's, in OpenSSH's format."},
            "name": {"type": "string", "maxLength": 100, "description": "For people."},
        },
        optional=("name",),
    ),
    "Joined": _object(
        {
            "device": {"type": "string", "description": "32 hexadecimal digits of the public key's sha256."},
            "name": _TEXT,
            "address": _or_null("string") | {"description": "Where the fleet's calls go, if not here."},
        }
    ),
    "NewsRequest": _object(
        {
            "new_images": _COUNT | {"maximum": 10**9, "description": "That the device has not learned from."},
            "time": {"type": "string", "maxLength": 40, "description": "When it says so: ISO 8601, UTC."},
            "signature": {
                "type": "string",
                "maxLength": 300,
                "description": "Base64 of the device's ECDSA signature over lowssl-news, device, new_images and time, "
                "one on each line.",
            },
        }
    ),
    "Heard": _object({"device": _TEXT, "new_images": _COUNT}),
    "OrderRequest": _object({"rounds": {"type": "integer", "minimum": 1, "maximum": 100_000}}, optional=("rounds",)),
    "Released": _object({"device": _TEXT}),
    "FederationStatus": {
        "type": "object",
        "properties": {
            "phase": {"type": "string", "description": "What it is doing; not begun, idle, stopped among others."},
            "round": {**_COUNT, "description": "The last one completed."},
            "ordered": {**_COUNT, "description": "The last one that is to be done."},
            "devices": {**_COUNT, "description": "That have joined."},
            "quarantine": {"type": "object", "description": "Devices, and why."},
            "fingerprint": {"type": "string", "description": "sha256 of the server's certificate."},
        },
        "required": ["phase", "devices", "fingerprint"],
    },
    "Devices": _object(
        {
            "devices": _array(
                _object(
                    {
                        "device": _TEXT,
                        "name": _TEXT,
                        "status": {"type": "string", "description": "online, offline, registered, removed or unknown."},
                        "joined": {"type": "string", "format": "date-time"},
                        "last_round": _or_null("integer"),
                        "new_images": _COUNT,
                        "told": _or_null("string"),
                        "quarantine": _or_null("string"),
                    }
                )
            )
        }
    ),
    "Rounds": _object({"rounds": _array({"type": "object"})}),
}
