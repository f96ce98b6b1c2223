"""Rounds become versions, each once, and what is worse than what serves does not serve."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from federation_server import Site, site

from lowssl_core.encoder import load_encoder
from lowssl_core.errors import UserError
from lowssl_core.evaluation.onnx_encoder import OnnxEncoder
from lowssl_core.protocol.manifest import FloatArray, unpack
from server.federation import orders
from server.federation.history import Completed, History, Record
from server.federation.operation import Operation
from server.federation.versions import next_round, rounds_made
from server.registry.imports import ImportOptions, import_encoder
from server.registry.rounds import make_version


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Site]:
    """A federation that began with the version that serves."""
    with site(tmp_path) as made:
        with made.registry() as registry:
            added = import_encoder(registry, "default", ImportOptions(who="a test")).version
            registry.promote(added.name, who="a test")
        made.begin("--from", "v1")
        yield made


def complete(folder: Path, change: float = 0.001, *, flat: FloatArray | None = None) -> int:
    """Complete a round by hand: each parameter moved a little, or another model; returns its number."""
    history = History(folder)
    last = history.last()
    number = last.record.version + 1
    if flat is None:
        trained = history.manifest.trained_size
        flat = last.flat.copy()
        flat[:trained] *= 1 + change * np.random.default_rng(number).standard_normal(trained).astype(np.float32)
    metrics = {"steps": 4, "seconds": 1.0, "new_images": 10, "replayed_images": 0, "loss": 2.0, "drift": None}
    accepted = tuple(
        {"device": f"device-{index}", "weight": 10.0, "metrics": metrics | {"loss": 1.0 + index}} for index in range(2)
    )
    rejected = ({"device": "device-2", "update_id": "u", "reason": "not finite", "detail": "3 values"},)
    record = Record(
        version=number,
        started="2026-01-01T00:00:00+00:00",
        asked=("device-0", "device-1", "device-2"),
        accepted=accepted,
        rejected=rejected,
    )
    history.save(Completed(record, flat))
    return number


def make(made: Site, number: int) -> str:
    with made.registry() as registry:
        return make_version(registry, made.folder, number, made.settings, who="a test").name


def serving(made: Site) -> str:
    with made.registry() as registry:
        version = registry.serving()
    assert version is not None
    return version.name


def test_a_round_becomes_a_version_with_its_lineage_and_serves(begun: Site) -> None:
    name = make(begun, complete(begun.folder))
    assert serving(begun) == name == "v2"
    history = History(begun.folder)
    with begun.registry() as registry:
        version = registry.version(name)
        weights, onnx = registry.fetch(version, "encoder"), registry.fetch(version)
    assert (version.kind, version.parent, version.state) == ("federated", "v1", "serving")
    assert version.metrics["devices"] == 2
    assert version.metrics["loss"] == 1.5
    facts = version.facts["federation"]
    assert isinstance(facts, dict)
    assert (facts["round"], facts["run"], facts["devices"], facts["images"]) == (1, history.run, 2, 20.0)
    assert facts["rejected"] == [{"device": "device-2", "reason": "not finite", "detail": "3 values"}]
    # What serves are the round's own weights, in the network that the recipe describes.
    state = unpack(history.last().flat, history.manifest)
    backbone = load_encoder(weights).backbone.state_dict()
    for key, value in backbone.items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, state[f"online.backbone.{key}"])
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    torch.testing.assert_close(
        OnnxEncoder(onnx).embed_inputs(images), load_encoder(weights).embed_inputs(images), rtol=1e-3, atol=1e-3
    )
    assert make(begun, complete(begun.folder)) == "v3"
    with begun.registry() as registry:
        assert registry.version("v3").parent == "v2"


def test_models_that_nothing_goes_on_from_are_removed_and_their_records_stay(
    begun: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.registry import rounds

    monkeypatch.setattr(rounds, "_KEPT_MODELS", 1)
    for _ in range(3):
        complete(begun.folder)
    made = [make(begun, number) for number in (2, 3, 3)]
    assert made == ["v2", "v3", "v3"]
    history, operation = History(begun.folder), Operation.load(begun.folder)
    assert [record.version for record in history.records()] == [0, 1, 2, 3]
    assert [number for number in range(4) if history.has_model(number)] == [0, 2, 3]
    assert history.last().record.version == 3
    with pytest.raises(UserError, match="round 1 has no model any more"):
        make(begun, 1)
    assert operation is not None
    with begun.registry() as registry:
        assert next_round(registry.versions(), begun.folder, operation) is None, "it is not asked for again and again"


def test_a_model_that_has_collapsed_is_refused_kept_and_shown(begun: Site) -> None:
    history = History(begun.folder)
    collapsed = history.last().flat.copy()
    collapsed[: history.manifest.trained_size] = 0
    name = make(begun, complete(begun.folder, flat=collapsed))
    assert serving(begun) == "v1"
    with begun.registry() as registry:
        version = registry.version(name)
        report = registry.events(name)[-1].report
    assert version.state == "refused"
    assert "encoder" in version.files
    assert report is not None
    assert not report.passed
    # A good round after it is judged against what serves, not against what was refused.
    good = make(begun, complete(begun.folder, flat=history.load(0).flat * np.float32(1.0001)))  # type: ignore[union-attr]
    assert serving(begun) == good
    with begun.registry() as registry:
        assert registry.version(good).parent == name


def test_a_model_with_a_number_that_is_none_is_refused_kept_and_shown(begun: Site) -> None:
    broken = History(begun.folder).last().flat.copy()
    broken[17] = np.nan
    name = make(begun, complete(begun.folder, flat=broken))
    assert serving(begun) == "v1"
    with begun.registry() as registry:
        assert registry.version(name).state == "refused"
        report = registry.events(name)[-1].report
    assert report is not None
    assert [check.name for check in report.failed] == ["export"]
    assert "not finite" in report.failed[0].why
    assert make(begun, 1) == name, "asked again it is what it was"


def test_a_plan_may_leave_versions_to_a_person(tmp_path: Path) -> None:
    with site(tmp_path) as made:
        made.begin(plan="[versions]\npromote = false\nevery = 2\n")
        operation = Operation.load(made.folder)
        assert operation is not None
        for _ in range(3):
            complete(made.folder)
        with made.registry() as registry:
            assert next_round(registry.versions(), made.folder, operation) == 2
            version = make_version(registry, made.folder, 2, made.settings, who="a test")
            assert (version.state, version.parent) == ("candidate", None)
            assert next_round(registry.versions(), made.folder, operation) is None
            orders.order(made.folder, 3)  # the last one that was ordered is one in any case
            assert next_round(registry.versions(), made.folder, operation) == 3
            assert registry.serving() is None


def test_killed_between_adding_and_judging_it_is_judged_later_and_added_once(
    begun: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.registry import rounds

    complete(begun.folder)
    with monkeypatch.context() as patched, begun.registry() as registry:

        def die(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(rounds, "judge_and_promote", die)
        with pytest.raises(KeyboardInterrupt):
            make_version(registry, begun.folder, 1, begun.settings, who="a test")
    operation = Operation.load(begun.folder)
    assert operation is not None
    with begun.registry() as registry:
        assert registry.version("v2").state == "candidate"
        assert next_round(registry.versions(), begun.folder, operation) == 1
    assert make(begun, 1) == serving(begun) == "v2"


def test_a_server_makes_up_for_versions_that_are_missing_once_each(begun: Site) -> None:
    for _ in range(2):
        complete(begun.folder)
    begun.start()
    begun.wait_for(lambda: count(begun) >= 1)
    begun.kill()  # in the middle of the second one, or close to it
    begun.start()
    begun.wait_for(lambda: serving(begun) == "v3")
    with begun.registry() as registry:
        made = rounds_made(registry.versions(), History(begun.folder).run)
        assert {number: version.name for number, version in made.items()} == {1: "v2", 2: "v3"}
        assert len(registry.versions()) == 3
    assert begun.stop() == 0


def count(made: Site) -> int:
    with made.registry() as registry:
        return len(rounds_made(registry.versions(), History(made.folder).run))


def test_what_cannot_be_made_is_told_and_tried_again_while_serving_goes_on(begun: Site) -> None:
    complete(begun.folder)
    plan = (begun.folder / "plan.json").read_text()
    (begun.folder / "plan.json").write_text(plan.replace('"resnet_tiny"', '"resnet18"'))
    begun.start()
    with begun.client() as client:
        begun.wait_for(lambda: "trouble" in client.get("/v1/federation").json())
        trouble = client.get("/v1/federation").json()["trouble"]
        assert trouble["round"] == 1
        assert "another network" in trouble["reason"]
        assert client.get("/readyz").json()["version"] == "v1"
        (begun.folder / "plan.json").write_text(plan)
        begun.wait_for(lambda: serving(begun) == "v2")
        begun.wait_for(lambda: "trouble" not in client.get("/v1/federation").json())
    assert begun.stop() == 0
