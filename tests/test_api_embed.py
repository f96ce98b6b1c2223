"""`/embed`: every kind of body and answer gives the same embeddings, and what is wrong is said of the right thing."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray
from serving_app import WIDTH, TestClient, make_registry, photo, running

from lowssl_core.images import decode
from lowssl_core.preprocess import Preprocess
from server.registry.registry import open_registry
from server.serving.session import EncoderSession
from server.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_registry(tmp_path_factory.mktemp("data"), versions=2)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with running(settings) as client:
        yield client


@pytest.fixture(scope="module")
def expected(settings: Settings) -> NDArray[np.float32]:
    """What the encoder says of photo(0), photo(1), without any server."""
    registry = open_registry(settings)
    session = EncoderSession(registry.fetch(registry.version("v2")))
    inputs = np.stack([_preprocess(session.preprocess, photo(seed)) for seed in range(2)])
    registry.close()
    return session.run(inputs)[1]


def _preprocess(preprocess: Preprocess, data: bytes) -> NDArray[np.uint8]:
    return preprocess(decode(data))


def _npy(array: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _multipart(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [(f"field{number % 2}", (f"{number}.jpg", image, "image/jpeg")) for number, image in enumerate(images)]


JSON_TYPE = {"Content-Type": "application/json"}


def test_every_kind_of_body_gives_the_encoders_embeddings(client: TestClient, expected: NDArray[np.float32]) -> None:
    photos = [photo(0), photo(1)]
    arrays = np.stack([decode(image) for image in photos])
    answers = [
        client.post("/embed", files=_multipart(*photos)),
        client.post("/v1/embed", json={"images": [_text(photos[0]), "data:image/jpeg;base64," + _text(photos[1])]}),
        client.post("/embed", content=_npy(arrays), headers={"Content-Type": "application/x-npy"}),
    ]
    for answer in answers:
        body = answer.json()
        assert (answer.status_code, body["version"], body["dimension"], body["normalized"]) == (200, "v2", WIDTH, True)
        assert (answer.headers["X-Lowssl-Version"], answer.headers["X-Lowssl-Dimension"]) == ("v2", str(WIDTH))
        assert [entry["index"] for entry in body["embeddings"]] == [0, 1]
        np.testing.assert_allclose([entry["embedding"] for entry in body["embeddings"]], expected, atol=1e-6)


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "image/png", "application/octet-stream", "IMAGE/JPEG; q=1", None]
)
def test_a_raw_body_is_one_image_whatever_image_type_it_is_called(
    client: TestClient, expected: NDArray[np.float32], content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post("/embed", content=photo(0), headers=headers)
    np.testing.assert_allclose(answer.json()["embeddings"][0]["embedding"], expected[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_read(client: TestClient, kind: str) -> None:
    assert client.post("/embed", content=photo(0, kind=kind), headers={"Content-Type": "image/*"}).status_code == 200


def test_every_kind_of_answer_holds_the_same_numbers(client: TestClient, expected: NDArray[np.float32]) -> None:
    files = _multipart(photo(0), photo(1))
    text = client.post("/embed?encoding=base64", files=files).json()
    packed = client.post("/embed", files=files, headers={"Accept": "application/msgpack"})
    array = client.post("/embed", files=files, headers={"Accept": "application/x-npy;q=0.9, text/html"})
    assert (packed.headers["Content-Type"], array.headers["Content-Type"]) == (
        "application/msgpack",
        "application/x-npy",
    )
    assert array.headers["X-Lowssl-Version"] == "v2"
    matrices = [
        [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in text["embeddings"]],
        [np.frombuffer(entry["embedding"], "<f4") for entry in msgpack.unpackb(packed.content)["embeddings"]],
        np.load(io.BytesIO(array.content), allow_pickle=False),
    ]
    for matrix in matrices:
        np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_features_are_embeddings_before_they_are_made_one_long(
    client: TestClient, expected: NDArray[np.float32]
) -> None:
    body = client.post("/embed?normalize=false", content=photo(0)).json()
    features = np.array(body["embeddings"][0]["embedding"])
    assert body["normalized"] is False
    assert abs(np.linalg.norm(features) - 1) > 0.1
    np.testing.assert_allclose(features / np.linalg.norm(features), expected[0], atol=1e-6)


def test_a_version_can_be_asked_for(client: TestClient) -> None:
    old, new = (client.post(f"/embed?version={version}", content=photo(0)) for version in ("v1", "v2"))
    assert (old.json()["version"], new.headers["X-Lowssl-Version"]) == ("v1", "v2")
    assert old.json()["embeddings"] != new.json()["embeddings"]


def test_one_bad_image_among_many_has_an_error_of_its_own(client: TestClient, expected: NDArray[np.float32]) -> None:
    answer = client.post("/embed", files=_multipart(b"no image", photo(1), photo(0)[:300]))
    first, second, third = answer.json()["embeddings"]
    assert answer.status_code == 200
    assert first == {"index": 0, "error": {"code": "unknown_format", "message": first["error"]["message"]}}
    assert "JPEG" in first["error"]["message"]
    np.testing.assert_allclose(second["embedding"], expected[1], atol=1e-6)
    assert third["error"]["code"] in ("truncated", "unreadable")


def test_an_array_has_no_place_for_errors(client: TestClient) -> None:
    files = _multipart(b"no image", photo(1))
    answer = client.post("/embed", files=files, headers={"Accept": "application/x-npy"})
    assert answer.status_code == 422
    assert [(error["index"], error["code"]) for error in answer.json()["errors"]] == [(0, "unknown_format")]


def test_texts_that_are_no_images_are_named_one_by_one(client: TestClient) -> None:
    texts = ["http://example.org/a.jpg", "no base64!", "data:image/png,abc", "é", _text(b"no image")]
    body = client.post("/embed", json={"images": texts}).json()
    codes = [entry["error"]["code"] for entry in body["embeddings"]]
    assert codes == ["not_fetched", "not_base64", "not_base64", "not_base64", "unknown_format"]


@pytest.mark.parametrize(
    ("status", "code", "content", "headers"),
    [
        (415, "unknown_format", b"no image", {"Content-Type": "image/jpeg"}),
        (415, "unreadable", photo(0)[:300], {}),
        (415, "truncated", photo(0)[:-20], {}),
        (413, "too_large", photo(0, (6000, 5000), "PNG"), {}),
        (422, "too_small", photo(0, (64, 4)), {}),
        (422, "not_fetched", b'{"images": ["https://example.org/a.jpg"]}', JSON_TYPE),
        (422, "not_base64", b'{"images": ["?"]}', JSON_TYPE),
        (422, "invalid", b"", {"Content-Type": "image/jpeg"}),
        (422, "invalid", b"{", JSON_TYPE),
        (422, "invalid", b"[]", JSON_TYPE),
        (422, "invalid", b"[" * 100_000, JSON_TYPE),
        (422, "invalid", b'{"images": []}', JSON_TYPE),
        (422, "invalid", b'{"images": "aaaa"}', JSON_TYPE),
        (422, "invalid", b'{"images": [1]}', JSON_TYPE),
        (422, "invalid", b'{"images": [], "url": 1}', JSON_TYPE),
        (413, "too_large", json.dumps({"images": ["aaaa"] * 65}).encode(), JSON_TYPE),
        (415, "unsupported_media_type", photo(0), {"Content-Type": "text/plain"}),
        (415, "unsupported_media_type", photo(0), {"Content-Type": "application/x-www-form-urlencoded"}),
        (415, "unsupported_media_type", photo(0), {"Content-Type": "image/jpeg", "Content-Encoding": "gzip"}),
        (406, "not_acceptable", photo(0), {"Accept": "text/html, application/json;q=0"}),
        (413, "too_large", b"x" * 10_000_001, {}),
        (422, "invalid", b"--b\r\n", {"Content-Type": "multipart/form-data"}),
        (422, "invalid", b"nothing", {"Content-Type": "multipart/form-data; boundary=b"}),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    client: TestClient, status: int, code: str, content: bytes, headers: dict[str, str]
) -> None:
    answer = client.post("/embed", content=content, headers=headers)
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert body["request_id"] == answer.headers["X-Request-ID"]
    assert body["detail"]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((40, 40, 3), np.float32),
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((0, 40, 40, 3), np.uint8),
        np.zeros((2, 0, 40, 3), np.uint8),
        np.zeros((65, 9, 9, 3), np.uint8),
        np.asfortranarray(np.zeros((40, 41, 3), np.uint8)),
        np.array([{"an": "object"}]),
    ],
)
def test_arrays_that_are_no_images_are_refused(client: TestClient, array: NDArray[np.generic]) -> None:
    answer = client.post("/embed", content=_npy(array), headers={"Content-Type": "application/x-npy"})
    assert answer.status_code in (413, 422)


def test_an_array_that_claims_more_than_it_has_is_refused_before_memory_is_taken(client: TestClient) -> None:
    honest = _npy(np.zeros((40, 40, 3), np.uint8))
    for lie in (honest.replace(b"(40, 40, 3)", b"(90, 9000000000, 3)"), honest[:-1], honest[:60], b"\x93NUMPY"):
        answer = client.post("/embed", content=lie, headers={"Content-Type": "application/x-npy"})
        assert answer.status_code == 422


@pytest.mark.parametrize("count", [64, 65])
def test_files_are_counted(client: TestClient, count: int) -> None:
    answer = client.post("/embed", files=_multipart(*[photo(0)] * count))
    assert answer.status_code == (200 if count == 64 else 413)


def test_a_field_that_is_no_file_is_refused(client: TestClient) -> None:
    answer = client.post("/embed", files=_multipart(photo(0)), data={"normalize": "false"})
    assert answer.status_code == 422
    assert "'normalize'" in answer.json()["detail"]


def test_parameters_are_checked(client: TestClient) -> None:
    for query in ("version=v9", "version=", "version=../x"):
        answer = client.post(f"/embed?{query}", content=photo(0))
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_version")
    for query in ("normalize=maybe", "encoding=hex"):
        assert client.post(f"/embed?{query}", content=photo(0)).status_code == 422


def test_without_an_encoder_the_answer_says_how_to_import_one(tmp_path: Path) -> None:
    with running(make_registry(tmp_path, versions=0)) as client:
        answer = client.post("/embed", content=photo(0))
    assert (answer.status_code, answer.json()["code"]) == (503, "no_model")
    assert f"lowssl registry import default --data-dir {tmp_path}" in answer.json()["detail"]
