"""API keys: shown once, kept as a hash, and obeyed by a running server, its limits and revocations included."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_app import TestClient, make_registry, photo, running, settings_for

from lowssl_core.command_line import main as lowssl
from server.access.keys import ROLES, ApiKey, Role, create_key, list_keys, revoke_key
from server.access.rates import RateLimits
from server.database.engine import Database
from server.registry.registry import open_registry

IMAGE = {"content": photo(0)}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    make_registry(tmp_path)
    registry = open_registry(settings_for(tmp_path))
    yield registry.database
    registry.close()


@pytest.fixture
def client(tmp_path: Path, database: Database) -> Iterator[TestClient]:
    with running(settings_for(tmp_path, require_keys=True)) as client:
        yield client


def _key(database: Database, role: Role = "embed", requests_per_minute: int | None = None) -> tuple[ApiKey, str]:
    return create_key(database, role=role, name=f"{role} test", requests_per_minute=requests_per_minute)


def _bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def test_the_command_shows_a_key_once_and_the_database_has_its_hash_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-dir", str(tmp_path)]
    assert lowssl(["keys", "create", "--role", "operate", "--name", "night shift", *where]) == 0
    text = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lowssl_"))
    key_id, secret = text.split("_")[1:]
    assert len(bytes.fromhex(secret)) * 8 == 256
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("registry.sqlite3*"))
    assert secret.encode() not in stored
    assert hashlib.sha256(text.encode()).hexdigest().encode() in stored

    assert lowssl(["keys", "list", *where]) == 0
    listed = capsys.readouterr().out
    assert key_id in listed
    assert "night shift" in listed
    assert "operate" in listed
    assert secret not in listed

    assert lowssl(["keys", "revoke", key_id, *where]) == 0
    assert lowssl(["keys", "list", *where]) == 0
    assert "revoked" in capsys.readouterr().out
    assert lowssl(["keys", "revoke", "nonesuch", *where]) == 2
    assert "no key has the id nonesuch" in capsys.readouterr().err


def test_two_keys_are_never_the_same(database: Database) -> None:
    made = [_key(database) for _ in range(20)]
    assert len({text for _, text in made}) == len({key.id for key, _ in made}) == 20
    assert [key.id for key in list_keys(database)] == [key.id for key, _ in made]


def test_a_key_opens_the_door_by_either_header(client: TestClient, database: Database) -> None:
    _, text = _key(database)
    for headers in (_bearer(text), {"X-API-Key": text}, {"Authorization": f"bearer  {text} "}):
        assert client.post("/embed", headers=headers, **IMAGE).status_code == 200


def test_without_a_good_key_nothing_but_health_and_pages_is_open(client: TestClient, database: Database) -> None:
    key, text = _key(database)
    other = "0" if text[-1] != "0" else "1"
    wrong = [{}, _bearer(text[:-1] + other), _bearer("x"), _bearer(""), {"Authorization": f"Basic {text}"}]
    wrong += [_bearer(text.replace(key.id, "0" * 12)), {"X-API-Key": key.id}]
    for headers in wrong:
        answer = client.post("/embed", headers=headers, **IMAGE)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    for path in ("/metrics", "/info", "/v1/models", "/v1/models/v1"):
        assert client.get(path).status_code == 401
    for path in ("/v1/similarity", "/v1/embeddings", "/v1/models/rollback", "/v1/models/v1/promote"):
        assert client.post(path).status_code == 401
    for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_pages_that_anyone_may_see_name_no_folder(tmp_path: Path) -> None:
    with running(settings_for(tmp_path, require_keys=True)) as client:
        for path in ("/", "/readyz"):
            assert str(tmp_path) not in client.get(path).text


def test_roles_include_those_below_them(client: TestClient, database: Database) -> None:
    allowed: dict[Role, int] = {"embed": 403, "operate": 409, "admin": 409}  # 409: there is nothing to roll back to
    texts = {role: _key(database, role)[1] for role in ROLES}
    for role, status in allowed.items():
        text = texts[role]
        assert client.post("/embed", headers=_bearer(text), **IMAGE).status_code == 200
        assert client.post("/v1/models/rollback", headers=_bearer(text), json={}).status_code == status


def test_new_and_revoked_keys_are_noticed_within_seconds(client: TestClient, database: Database) -> None:
    _, first = _key(database)
    assert client.post("/embed", headers=_bearer(first), **IMAGE).status_code == 200
    key, second = _key(database)
    _wait_for(client, second, 200)
    revoke_key(database, key.id)
    _wait_for(client, second, 401)
    assert client.post("/embed", headers=_bearer(first), **IMAGE).status_code == 200


def _wait_for(client: TestClient, text: str, status: int) -> None:
    deadline = time.monotonic() + 5
    while client.post("/embed", headers=_bearer(text), **IMAGE).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_last_use_is_written_down(tmp_path: Path, database: Database) -> None:
    key, text = _key(database)
    with running(settings_for(tmp_path, require_keys=True)) as client:
        client.post("/embed", headers=_bearer(text), **IMAGE)
    (found,) = list_keys(database)
    assert found.id == key.id
    assert found.last_used is not None
    assert found.last_used >= key.created


def test_each_key_has_a_rate_of_its_own(client: TestClient, database: Database) -> None:
    _, slow = _key(database, requests_per_minute=3)
    _, free = _key(database)
    statuses = [client.post("/embed", headers=_bearer(slow), **IMAGE).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refusal = client.post("/embed", headers=_bearer(slow), **IMAGE)
    assert 1 <= int(refusal.headers["Retry-After"]) <= 20
    assert client.post("/embed", headers=_bearer(free), **IMAGE).status_code == 200


def test_the_setting_is_the_rate_of_keys_without_one_and_of_callers_without_a_key(
    tmp_path: Path, database: Database
) -> None:
    _, text = _key(database)
    with running(settings_for(tmp_path, requests_per_minute=2)) as client:
        for headers in ({}, _bearer(text)):
            statuses = [client.post("/embed", headers=headers, **IMAGE).status_code for _ in range(3)]
            assert statuses == [200, 200, 429]
        assert client.get("/healthz").status_code == 200


def test_a_bucket_fills_evenly() -> None:
    now = 0.0
    limits = RateLimits(clock=lambda: now)
    assert [limits.take("a", 60) for _ in range(60)] == [0.0] * 60
    assert limits.take("a", 60) == pytest.approx(1.0)
    now = 0.5
    assert limits.take("a", 60) == pytest.approx(0.5)
    now = 1.0
    assert limits.take("a", 60) == 0.0
    now = 1000.0
    assert [limits.take("a", 60) == 0 for _ in range(61)] == [True] * 60 + [False]


def test_on_loopback_a_foreign_key_is_passed_over_and_a_wrong_one_of_ours_is_not(
    tmp_path: Path, database: Database
) -> None:
    _, text = _key(database)
    with running(settings_for(tmp_path)) as client:
        assert client.post("/embed", headers=_bearer("sk-of-another-service"), **IMAGE).status_code == 200
        assert client.post("/embed", headers=_bearer(text[:-1]), **IMAGE).status_code == 401


def test_no_log_holds_a_key_or_an_image(tmp_path: Path, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = _key(database)
    with running(settings_for(tmp_path, require_keys=True)) as client:
        client.post(f"/embed?key={text}", headers=_bearer(text), **IMAGE)
        client.post("/embed", headers=_bearer(text[:-1]), **IMAGE)
    logged = capsys.readouterr().err
    assert '"key":"embed test"' in logged
    assert text[20:-1] not in logged
    assert "JFIF" not in logged


@pytest.mark.parametrize("action", [["list"], ["revoke", "abc"]])
def test_a_folder_misspelled_does_not_become_a_servers(
    action: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "misspelled"
    assert lowssl(["keys", *action, "--data-dir", str(folder)]) == 2
    assert f"there is no registry in {folder}" in capsys.readouterr().err
    assert not folder.exists()
