"""A whole federation over TLS: server, devices that joined by a token, rounds, versions, and the server's death."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_server import Site, site

from lowssl_core.processes import descendants
from server.federation import orders
from server.federation.history import History
from server.federation.versions import rounds_made
from server.registry.version import Version

PLAN = """\
[rounds]
seconds = 90

[aggregator]
name = "fedavg"
momentum = 0.0

[versions]
promote = true
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as made:
        made.begin("--from", "default", plan=PLAN)
        made.start()
        token = made.token(uses=2)
        for name in ("kitchen", "garden"):
            made.join(name, token)
            made.start_device(name, seconds=3.0)
        yield made


def versions(federation: Site) -> dict[int, Version]:
    with federation.registry() as registry:
        return rounds_made(registry.versions(), History(federation.folder).run)


def judged(federation: Site, number: int) -> bool:
    made = versions(federation)
    return number in made and made[number].state != "candidate"


def test_two_rounds_become_two_versions_and_the_last_one_serves(federation: Site) -> None:
    federation.lowssl("round", "--count", "2")
    federation.wait_for(lambda: judged(federation, 2))
    made = versions(federation)
    assert sorted(made) == [1, 2]
    assert (made[1].kind, made[2].kind, made[1].parent, made[2].parent) == ("federated", "federated", None, "v1")
    assert (made[1].state, made[2].state) == ("retired", "serving")
    assert made[2].metrics["devices"] == 2
    assert made[2].metrics["loss"] == 1.5
    with federation.client() as client:
        federation.wait_for(lambda: client.get("/readyz").json().get("version") == made[2].name)
        devices = client.get("/v1/federation/devices").json()["devices"]
        assert [(row["name"], row["status"], row["last_round"]) for row in devices] == [
            ("kitchen", "online", 2),
            ("garden", "online", 2),
        ]
        rows = client.get("/v1/federation/history").json()["rounds"]
        assert [(row["round"], row["accepted"], row["version"]) for row in rows] == [(2, 2, "v2"), (1, 2, "v1")]


def test_the_serving_process_has_neither_torch_nor_flower(federation: Site) -> None:
    assert federation.process is not None
    maps = Path(f"/proc/{federation.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "grpc" not in maps


def test_a_server_killed_in_a_round_comes_back_and_loses_none(federation: Site) -> None:
    before = History(federation.folder).newest()
    assert federation.process is not None
    family = descendants(federation.process.pid)
    with federation.client() as client:
        assert client.post("/v1/federation/rounds", json={"rounds": 1}).json()["ordered"] == before + 1
    federation.wait_for(lambda: orders.told(federation.folder).get("phase") == "collecting")
    federation.kill()
    federation.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    federation.start()
    federation.wait_for(lambda: judged(federation, before + 1))
    records = History(federation.folder).records()
    assert [record.version for record in records] == list(range(before + 2))
    assert len(records[-1].accepted) == 2
    assert np.isfinite(History(federation.folder).last().flat).all()
    assert sorted(versions(federation)) == list(range(1, before + 2))
    with federation.registry() as registry:
        assert len(registry.versions()) == before + 1, "each round became one version"


def test_it_ends_when_told_to_and_leaves_nothing_running(federation: Site) -> None:
    assert federation.process is not None
    family = descendants(federation.process.pid)
    assert federation.stop() == 0
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
