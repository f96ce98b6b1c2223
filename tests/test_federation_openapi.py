"""The OpenAPI description of a server with a federation is true: its routes answer as it says."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from federation_server import Site, site
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import create_app
from server.settings import Settings

CHECKS = [status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance]
EXAMPLES, EXAMPLES_WITHOUT_BODY = 30, 2  # of each route; listing devices asks Flower, which takes a second or two


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as made:
        made.begin()
        made.start()
        made.join("kitchen", made.token())
        yield made


def test_whatever_is_sent_is_answered_as_described(server: Site) -> None:
    base = f"https://127.0.0.1:{server.port}"
    statuses: Counter[tuple[str, int]] = Counter()
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(server.folder / "server.pem")
        described = session.get(f"{base}/openapi.json").json()
        schema = schemathesis.openapi.from_dict(described)

        def send(case: Case) -> None:
            response = case.call(base_url=base, session=session, verify=session.verify)
            statuses[case.operation.label, response.status_code] += 1
            assert response.status_code < 500, response.text
            case.validate_response(response, checks=CHECKS)

        for found in schema.get_all_operations():
            operation: APIOperation[Any] = found.ok()
            if operation.definition.raw["tags"] != ["federation"]:
                continue
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                with contextlib.suppress(Unsatisfiable):  # where there is nothing that could be wrong
                    _try(operation, mode, send)
    print(dict(statuses))
    answered = {label for label, status in statuses if status == 200}
    assert answered >= {
        "GET /v1/federation",
        "GET /v1/federation/devices",
        "GET /v1/federation/history",
        "POST /v1/federation/rounds",
        "POST /v1/federation/stop",
    }
    assert {("POST /v1/devices", status) for status in (401, 422)} <= statuses.keys()


def _try(operation: "APIOperation[Any]", mode: GenerationMode, send: Any) -> None:
    @settings(
        max_examples=EXAMPLES if operation.body else EXAMPLES_WITHOUT_BODY,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def run(case: Case) -> None:
        send(case)

    run()


def test_the_routes_are_there_only_with_a_federation(tmp_path: Path) -> None:
    with_one, without = (
        create_app(Settings(data_dir=tmp_path, federation=is_on)).openapi()["paths"] for is_on in (True, False)
    )
    ours = {"/v1/devices", "/v1/devices/{device}/news", "/v1/federation", "/v1/federation/rounds"}
    assert ours <= with_one.keys()
    assert not ours & without.keys()
    for path in with_one.keys() - without.keys():
        for operation in with_one[path].values():
            body = operation.get("requestBody", {"content": {}})["content"].get("application/json")
            assert body is None or body["examples"], path
