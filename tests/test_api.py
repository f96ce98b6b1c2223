"""The API beside `/embed`: similarity, OpenAI's shape, versions, health, figures, pages, logs, errors."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from serving_app import WIDTH, TestClient, add_version, make_registry, photo, running, settings_for
from serving_models import build_model, describe

from server.api.service import Service
from server.registry.registry import Registry, open_registry
from server.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_registry(tmp_path_factory.mktemp("data"), versions=2)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with running(settings) as client:
        yield client


def _text(seed: int) -> str:
    return base64.b64encode(photo(seed)).decode()


def _openai(client: TestClient, **changes: object) -> tuple[int, dict[str, object]]:
    answer = client.post("/v1/embeddings", json={"model": "lowssl", "input": _text(0)} | changes)
    return answer.status_code, answer.json()


def test_similarity_is_the_cosine_of_embeddings(client: TestClient) -> None:
    images = [_text(0), _text(1), _text(0)]
    embeddings = client.post("/embed?normalize=false", json={"images": images}).json()["embeddings"]
    features = np.array([entry["embedding"] for entry in embeddings])
    lengths = np.linalg.norm(features, axis=1)
    answer = client.post("/v1/similarity", json={"images": images})
    body = answer.json()
    np.testing.assert_allclose(body["similarity"], features @ features.T / np.outer(lengths, lengths), atol=1e-6)
    assert (body["version"], answer.headers["X-Lowssl-Version"]) == ("v2", "v2")


def test_similarity_takes_two_good_images(client: TestClient) -> None:
    assert client.post("/v1/similarity", json={"images": [_text(0)]}).status_code == 422
    answer = client.post("/v1/similarity", json={"images": [_text(0), "?"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "unusable_images")
    assert answer.json()["errors"][0]["index"] == 1


def test_openais_shape_has_the_same_embeddings(client: TestClient) -> None:
    entries = client.post("/embed", json={"images": [_text(0), _text(1)]}).json()["embeddings"]
    expected = [entry["embedding"] for entry in entries]
    status, body = _openai(client, input=[_text(0), "data:image/jpeg;base64," + _text(1)], user="me")
    assert status == 200
    assert body["object"] == "list"
    assert body["model"] == "v2"
    assert [(one["object"], one["index"], one["embedding"]) for one in body["data"]] == [  # type: ignore[attr-defined]
        ("embedding", 0, expected[0]),
        ("embedding", 1, expected[1]),
    ]
    # What OpenAI's own client asks for and reads: base64 of little-endian float32.
    _, body = _openai(client, encoding_format="base64", dimensions=WIDTH)
    raw = base64.b64decode(body["data"][0]["embedding"])  # type: ignore[index]
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), np.array(expected[0], np.float32))
    assert _openai(client, model="v1")[1]["model"] == "v1"


@pytest.mark.parametrize(
    ("status", "code", "changes"),
    [
        (404, "model_not_found", {"model": "text-embedding-3-small"}),
        (400, "bad_request", {"model": None}),
        (400, "bad_request", {"input": [[1, 2, 3]]}),
        (400, "bad_request", {"encoding_format": "hex"}),
        (400, "bad_request", {"dimensions": 8}),
        (400, "bad_request", {"dimensions": True}),
        (400, "bad_request", {"colour": 1}),
        (422, "invalid", {"input": []}),
        (400, "not_fetched", {"input": "https://example.org/a.jpg"}),
        (400, "unknown_format", {"input": [_text(0), "aaaa"]}),
        (413, "too_large", {"input": ["aaaa"] * 65}),
    ],
)
def test_openais_errors_have_its_shape(client: TestClient, status: int, code: str, changes: dict[str, object]) -> None:
    found, body = _openai(client, **changes)
    error = body["error"]
    assert isinstance(error, dict)
    assert (found, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}


def test_versions_are_listed_and_shown(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert (listed["object"], [one["id"] for one in listed["data"]]) == ("list", ["v2", "v1"])
    assert [one["state"] for one in listed["data"]] == ["serving", "retired"]
    shown = client.get("/v1/models/v1").json()
    assert shown["description"]["width"] == shown["dimension"] == WIDTH
    assert [event["action"] for event in shown["events"]] == ["add", "promote", "retire"]
    assert client.get("/v1/models/v3").json()["code"] == "unknown_version"
    assert client.get("/v1/models/..%2Fx").status_code == 404


def test_rolling_back_is_served_at_once(tmp_path: Path) -> None:
    with running(make_registry(tmp_path, versions=2)) as client:
        answer = client.post("/v1/models/rollback", json={"why": "worse at night"})
        assert (answer.status_code, answer.json()["id"], answer.json()["state"]) == (200, "v1", "serving")
        assert client.post("/embed", content=photo(0)).headers["X-Lowssl-Version"] == "v1"
        events = client.get("/v1/models/v1").json()["events"]
        assert (events[-1]["action"], events[-1]["why"], events[-1]["who"]) == ("rollback", "worse at night", "API")
        again = client.post("/v1/models/rollback", json={})
        assert (again.status_code, again.json()["code"]) == (409, "conflict")


def _add_collapsed(registry: Registry, folder: Path) -> None:
    """An encoder whose features all point in the same direction."""
    description = describe("v3", width=WIDTH)
    model = build_model(description)
    for weights in model.graph.initializer:
        values = numpy_helper.to_array(weights)
        if weights.name == "kernel":
            weights.CopyFrom(numpy_helper.from_array(np.repeat(np.abs(values[:1]), WIDTH, 0), "kernel"))
        if weights.name == "mean":
            weights.CopyFrom(numpy_helper.from_array(np.zeros_like(values), "mean"))
    onnx.save(model, folder / "same.onnx")
    registry.add(kind="imported", description=description, files={"onnx": folder / "same.onnx"}, who="test")


def test_promotion_is_judged_in_a_process_of_its_own_and_served_at_once(tmp_path: Path) -> None:
    settings = make_registry(tmp_path, versions=1)
    registry = open_registry(settings)
    add_version(registry, tmp_path, promote=False)
    _add_collapsed(registry, tmp_path)
    registry.close()
    with running(settings) as client:
        answer = client.post("/v1/models/v2/promote", json={"why": "better", "force": True})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["version"]["id"], answer.json()["version"]["state"]) == ("v2", "serving")
        assert answer.json()["report"]["version"] == "v2"
        assert client.post("/embed", content=photo(0)).headers["X-Lowssl-Version"] == "v2"
        assert client.get("/v1/models/v2").json()["events"][-1]["why"] == "better"

        again = client.post("/v1/models/v2/promote", json={})
        assert (again.status_code, again.json()["detail"]) == (409, "v2 serves already")
        refused = client.post("/v1/models/v3/promote", json={})
        assert (refused.status_code, refused.json()["code"]) == (409, "refused")
        assert "v3 was refused" in refused.json()["detail"]
        assert client.get("/v1/models/v3").json()["state"] == "refused"
        assert client.post("/embed", content=photo(0)).headers["X-Lowssl-Version"] == "v2"


def test_a_web_page_cannot_change_what_serves(client: TestClient) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"):
        headers = {"Content-Type": content_type}
        assert client.post("/v1/models/rollback", content="{}", headers=headers).status_code == 415
    assert client.post("/v1/models/rollback", json={"reason": "x"}).status_code == 422
    assert client.post("/v1/models/rollback", json={"why": "x" * 3000}).status_code == 422
    assert client.post("/v1/models/rollback", json={"why": "\x00"}).status_code in (409, 422)


def test_readiness_follows_the_registry(tmp_path: Path) -> None:
    with running(settings_for(tmp_path, poll_seconds=60)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
        assert f"lowssl registry import default --data-dir {tmp_path}" in answer.json()["reason"]
        service: Service = client.app.state.service  # type: ignore[attr-defined]
        add_version(service.registry, tmp_path)
        client.portal.call(service.engine.refresh)  # type: ignore[union-attr]
        assert client.get("/readyz").json() == {"status": "ready", "version": "v1"}


def test_info_states_the_limits(client: TestClient) -> None:
    info = client.get("/info").json()
    assert (info["serving"]["version"], info["serving"]["dimension"]) == ("v2", WIDTH)
    assert (info["limits"]["max_body_bytes"], info["limits"]["max_images"]) == (10_000_000, 64)
    assert info["accepts"]["images"] == ["image/jpeg", "image/png", "image/webp"]


def test_figures_count_what_happened(tmp_path: Path) -> None:
    with running(make_registry(tmp_path)) as client:
        client.post("/embed", json={"images": [_text(0), _text(1), "?"]})
        client.post("/embed", content=b"no image")
        client.get("/nowhere")
        client.get("/v1/models/v1")
        text = client.get("/metrics").text
    figures = dict(re.findall(r"^(lowssl\S+) (\S+)$", text, re.MULTILINE))
    expected = {
        'lowssl_requests_total{route="/embed",status="200"}': 1,
        'lowssl_requests_total{route="/embed",status="415"}': 1,
        'lowssl_requests_total{route="other",status="404"}': 1,
        'lowssl_requests_total{route="/v1/models/{version}",status="200"}': 1,
        'lowssl_request_seconds_count{route="/embed"}': 2,
        'lowssl_images_total{outcome="embedded"}': 2,
        'lowssl_images_total{outcome="not_base64"}': 1,
        'lowssl_images_total{outcome="unknown_format"}': 1,
        'lowssl_version_loaded{version="v1"}': 1,
        "lowssl_ready": 1,
        "lowssl_in_flight": 0,
        "lowssl_waiting_images": 0,
    }
    assert {name: float(figures[name]) for name in expected} == expected
    assert "process_resident_memory_bytes" in text


def test_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        sources = re.findall(r"""(?:src|href)=["']([^"']*)["']""", page.text)
        assert sources
        assert all(source.startswith(("/", "data:")) and not source.startswith("//") for source in sources)
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        for source in sources:
            if source.startswith("/"):
                assert client.get(source).status_code == 200


def test_the_page_says_what_serves_or_how_to_import(client: TestClient, tmp_path: Path) -> None:
    page = client.get("/", headers={"Host": "example.org:8080"}).text
    assert "v2 serves" in page
    assert "http://example.org:8080/embed" in page
    with running(settings_for(tmp_path)) as empty:
        page = empty.get("/").text
    assert "no encoder serves yet" in page
    assert f"lowssl registry import default --data-dir {tmp_path}" in page


def test_a_host_cannot_write_into_the_page(client: TestClient) -> None:
    assert "<script" not in client.get("/", headers={"Host": "a<script>alert(1)</script>"}).text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/embed", 405, "method_not_allowed"),
        ("POST", "/embed/", 404, "not_found"),
    ],
)
def test_wrong_addresses_have_problems_too(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_fault_is_told_to_the_log_and_not_to_the_client(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(settings) as client:
        service: Service = client.app.state.service  # type: ignore[attr-defined]
        monkeypatch.setattr(service.metrics, "render", lambda: 1 / 0)
        monkeypatch.setattr(service.metrics, "count_images", lambda *_: 1 / 0)
        answer = client.get("/metrics", headers={"X-Request-ID": "mine"})
        assert _openai(client)[1]["error"] == {
            "message": "something went wrong here; the server's log says what, under this request_id",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    assert (answer.status_code, answer.json()["code"], answer.json()["request_id"]) == (500, "internal_error", "mine")
    assert "ZeroDivision" not in answer.text
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    fault, _ = [line for line in lines if line["level"] == "error"]
    assert fault["request_id"] == "mine"
    assert "ZeroDivisionError" in fault["exception"]


def test_each_request_has_one_line_in_the_log(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    content = photo(0)
    with running(settings) as client:
        answer = client.post("/embed?secret=1", content=content, headers={"X-Request-ID": "a.b-c_1"})
    assert answer.headers["X-Request-ID"] == "a.b-c_1"
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert list(line)[:3] == ["timestamp", "level", "event"]
    expected = {"request_id": "a.b-c_1", "method": "POST", "route": "/embed", "status": 200, "images": 1}
    expected |= {"bytes_in": len(content), "version": "v2", "key": ""}
    assert {name: line[name] for name in expected} == expected
    assert 0 < line["ms"] < 10_000
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("given", ["x" * 65, "a b", "a\tb", "\u00e9", ""])
def test_an_odd_request_id_is_replaced(client: TestClient, given: str) -> None:
    answer = client.get("/healthz", headers={"X-Request-ID": given.encode()})
    assert re.fullmatch(r"[0-9a-f]{12}-\d+", answer.headers["X-Request-ID"])


def test_cors_is_off_unless_it_is_asked_for(client: TestClient, settings: Settings) -> None:
    headers = {"Origin": "https://a.org", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in client.options("/embed", headers=headers).headers
    with running(settings.model_copy(update={"cors_origins": ("https://a.org",)})) as open_client:
        assert open_client.options("/embed", headers=headers).headers["Access-Control-Allow-Origin"] == "https://a.org"
        other = open_client.options("/embed", headers=headers | {"Origin": "https://b.org"})
        assert "Access-Control-Allow-Origin" not in other.headers


def test_a_registry_out_of_reach_is_503_and_what_serves_goes_on(tmp_path: Path) -> None:
    with running(make_registry(tmp_path)) as client:
        service: Service = client.app.state.service  # type: ignore[attr-defined]
        service.registry.close()
        for path in tmp_path.glob("registry.sqlite3*"):
            path.rename(tmp_path / ("gone-" + path.name))
        (tmp_path / "registry.sqlite3").mkdir()
        answer = client.get("/v1/models")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert str(tmp_path) not in answer.text
        assert client.post("/embed", content=photo(0)).status_code == 200


def test_two_servers_share_one_registry(tmp_path: Path) -> None:
    settings = make_registry(tmp_path)
    with running(settings) as first, running(settings) as second:
        registry = open_registry(settings)
        add_version(registry, tmp_path)
        registry.close()
        for client in (first, second):
            service: Service = client.app.state.service  # type: ignore[attr-defined]
            client.portal.call(service.engine.refresh)  # type: ignore[union-attr]
            assert client.post("/embed", content=photo(0)).headers["X-Lowssl-Version"] == "v2"
