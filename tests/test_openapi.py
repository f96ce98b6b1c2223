"""The OpenAPI description is true: whatever is made from it, the server answers as it says and never with a fault."""

import base64
import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving_app import Server, make_registry, photo, running, serving, settings_for

from server.access.keys import create_key
from server.api.descriptions import routes_table
from server.api.service import Service
from server.app import create_app

# Of each route, of data that fit the description and again of data that do not.
EXAMPLES, EXAMPLES_WITHOUT_BODY = 150, 10
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PHOTOS = [photo(seed, (40, 30), kind) for seed in range(3) for kind in ("JPEG", "PNG", "WEBP")]


def _arrays() -> list[bytes]:
    arrays = []
    for shape in ((9, 9, 3), (2, 20, 10, 3), (9, 9), (1, 1, 3)):
        file = io.BytesIO()
        np.save(file, np.full(shape, 7, np.uint8))
        arrays.append(file.getvalue())
    return arrays


def _damaged(good: list[bytes]) -> st.SearchStrategy[bytes]:
    """Good files, files cut short, files with a few other bytes in them, and no files at all."""
    whole = st.sampled_from(good)
    cut = st.builds(lambda data, part: data[: int(len(data) * part)], whole, st.floats(0, 1))
    spoilt = st.builds(
        lambda data, at, what: data[: at % len(data)] + what + data[at % len(data) + len(what) :],
        whole,
        st.integers(0, 100_000),
        st.binary(min_size=1, max_size=8),
    )
    return st.one_of(whole, cut, spoilt, st.binary(max_size=64))


for _type in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(_type, _damaged(PHOTOS))
schemathesis.openapi.media_type("application/x-npy", _damaged(_arrays()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openapi") / "data"
    make_registry(folder, versions=2)
    with serving(folder) as server:
        yield server


def _with_real_content(case: Case, texts: list[str]) -> None:
    """Put what means something to this server in the place of chance text, which a schema cannot describe."""
    if isinstance(case.body, dict):
        for field in ("images", "input"):
            if isinstance(case.body.get(field), list):
                case.body[field] = texts
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "lowssl"
        case.body.pop("dimensions", None)
    if case.operation.method == "get" and "version" in case.path_parameters:
        case.path_parameters["version"] = "v1"


def test_whatever_is_sent_is_answered_as_described(server: Server) -> None:
    base = f"http://127.0.0.1:{server.port}"
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    texts = st.lists(
        st.one_of(_damaged(PHOTOS).map(lambda data: base64.b64encode(data).decode()), st.text(max_size=20)), max_size=4
    )
    with requests.Session() as session:

        def send(case: Case) -> None:
            response = case.call(base_url=base, session=session)
            statuses[case.operation.label, response.status_code] += 1
            assert response.status_code < 500, response.text  # one caller at a time: no 503 either
            case.validate_response(response, checks=CHECKS)

        for found in schema.get_all_operations():
            operation: APIOperation[Any] = found.ok()
            examples = EXAMPLES if operation.body else EXAMPLES_WITHOUT_BODY
            _try(operation.as_strategy(GenerationMode.POSITIVE), examples, texts, send)
            with contextlib.suppress(Unsatisfiable):  # where there is nothing that could be wrong
                _try(operation.as_strategy(GenerationMode.NEGATIVE), examples, texts, send)
    total = sum(statuses.values())
    answered = {label for label, status in statuses if status == 200}
    print(f"{total} examples: {dict(statuses)}")
    assert total >= 1000
    assert answered >= {"POST /embed", "POST /v1/similarity", "POST /v1/embeddings", "GET /v1/models", "GET /info"}


def _try(
    cases: st.SearchStrategy[Case], examples: int, texts: st.SearchStrategy[list[str]], send: Callable[[Case], None]
) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, images=texts, is_real=st.booleans())
    def run(case: Case, images: list[str], is_real: bool) -> None:
        if is_real:
            _with_real_content(case, images)
        send(case)

    run()


def test_each_route_asks_for_the_role_that_is_described(tmp_path: Path) -> None:
    make_registry(tmp_path)
    with running(settings_for(tmp_path, require_keys=True)) as client:
        service: Service = client.app.state.service  # type: ignore[attr-defined]
        _, text = create_key(service.registry.database, role="embed")
        described = client.get("/openapi.json").json()
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                role = operation.get("x-role")
                address = path.replace("{version}", "v1")
                anonymous = client.request(method, address).status_code
                known = client.request(method, address, headers={"X-API-Key": text}).status_code
                assert (anonymous == 401, known == 403) == (role is not None, role == "operate"), (method, path)
        table = routes_table(described)
    assert "| `POST /embed` | Embed images | embed |" in table
    assert "| `GET /healthz` | Is the process alive? | none needed |" in table


def test_every_error_has_an_example_and_every_body_too(tmp_path: Path) -> None:
    described = create_app(settings_for(tmp_path)).openapi()
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                problem = answer["content"].get("application/problem+json")
                if problem is not None:
                    example = problem["examples"]["problem"]["value"]
                    assert (str(example["status"]), set(example) >= {"title", "detail", "code"}) == (status, True), path
            body = operation.get("requestBody", {"content": {}})["content"].get("application/json")
            assert body is None or body["examples"], path


def test_the_examples_can_be_tried(tmp_path: Path) -> None:
    make_registry(tmp_path)
    with running(settings_for(tmp_path)) as client:
        for path in ("/embed", "/v1/similarity", "/v1/embeddings"):
            body = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"][
                "application/json"
            ]
            for example in body["examples"].values():
                answer = client.post(path, json=example["value"])
                assert (answer.status_code, "error" in answer.text) == (200, False)
