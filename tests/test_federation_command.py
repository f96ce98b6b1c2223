"""`lowssl federation` as a person types it, with right and wrong input, and plans that are wrong by name."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from federation_server import RECIPE
from serving_app import add_version

from lowssl_core.command_line import main
from lowssl_core.encoder import load_encoder
from lowssl_core.errors import UserError
from lowssl_core.protocol.manifest import unpack
from lowssl_core.recipe import load_recipe
from server.aggregation.privacy import PrivateMeanConfig
from server.aggregation.robust import TrimmedMeanConfig
from server.api.federating import Federating
from server.api.service import Service
from server.federation import orders
from server.federation.federation import Federation
from server.federation.history import Completed, History, Record
from server.federation.joins import Device, join
from server.federation.operation import Operation, ScheduleConfig, Start, VersionsConfig
from server.federation.overview import device_rows, round_rows
from server.federation.plan import Plan
from server.federation.plans import PlanFile, read_plan
from server.federation.superlink import SuperLink
from server.registry.registry import Registry, open_registry
from server.registry.starts import open_start
from server.settings import Settings

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def call(data: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str) -> tuple[int, str, str]:
        status = main(["federation", *words, "--data-dir", str(data)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def registry(data: Path) -> Iterator[Registry]:
    with closing(open_registry(Settings(data_dir=data))) as opened:
        yield opened


def test_a_federation_is_begun_ordered_stopped_and_shown(call: Call, data: Path, recipe: str) -> None:
    status, out, _ = call("start", "--recipe", recipe)
    assert status == 0
    assert "begins with untrained" in out
    assert "no round is ordered yet" in out
    assert "idle" in call("status")[1]
    assert call("round", "--count", "3")[1] == "ordered: rounds up to 3\n"
    assert call("round")[1] == "ordered: rounds up to 4\n"
    assert orders.ordered(data / "federation") == 4
    assert call("stop")[1].startswith("stopped")
    assert json.loads(call("status", "--json")[1])["phase"] == "stopped"
    # What was ordered before the stop is not ordered any more.
    assert call("round")[1] == "ordered: rounds up to 1\n"
    assert "no round is completed yet" in call("history")[1]
    assert "no device has joined yet" in call("devices")[1]
    # A person has been at the file: it asks for nothing, and is written anew.
    for text in ("three", "3", "{}", '{"until": 1e999}'):
        (data / "federation" / "order.json").write_text(text)
        assert json.loads(call("status", "--json")[1])["ordered"] == 0, text
    assert call("round")[1] == "ordered: rounds up to 1\n"


def test_a_plan_stays_until_another_one_is_given(call: Call, data: Path, recipe: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("[rounds]\nseconds = 60\n[schedule]\ndevices = 1\nnew_images = 5\n[versions]\nevery = 7\n")
    assert call("start", "--recipe", recipe, "--plan", str(plan))[0] == 0
    for _ in range(2):
        assert Plan.from_json((data / "federation" / "plan.json").read_text()).rounds.seconds == 60
        operation = Operation.load(data / "federation")
        assert operation is not None
        assert (operation.schedule.new_images, operation.versions.every) == (5, 7)
        assert call("start", "--recipe", recipe)[0] == 0


def test_rounds_and_devices_are_listed(call: Call, data: Path, recipe: str, registry: Registry) -> None:
    from client.identity import open_identity

    call("start", "--recipe", recipe)
    token = call("token", "--uses", "2", "--name", "ward 3")[1].strip()
    identity = open_identity(data / "device")
    join(registry.database, token=token, public_key=identity.public, name="kitchen", register=lambda *_: 7)
    history = History(data / "federation")
    metrics = {"steps": 4, "seconds": 1.0, "new_images": 3, "replayed_images": 0, "loss": 1.0, "drift": None}
    record = Record(
        version=1,
        started="2026-01-02T03:04:05+00:00",
        seconds=90.0,
        asked=(identity.device, "b" * 32),
        accepted=({"device": identity.device, "weight": 3.0, "metrics": metrics},),
        rejected=({"device": "b" * 32, "update_id": "u", "reason": "not finite", "detail": ""},),
        bytes_up=2_500_000,
    )
    history.save(Completed(record, history.last().flat))
    out = call("history")[1]
    for part in ("2026-01-02 03:04", "1.5", "1 of 2", "bbbbbbbb: not finite", "2.5"):
        assert part in out
    rows = json.loads(call("devices", "--json")[1])
    assert [(row["name"], row["status"], row["last_round"]) for row in rows] == [("kitchen", "unknown", 1)]
    assert "no server runs the federation" in call("devices")[1]
    assert call("release", identity.device[:6])[0] == 0
    assert orders.releases(data / "federation") == [identity.device]
    status, _, errors = call("remove", identity.device)
    assert status == 2
    assert "no server runs the federation" in errors


def test_old_rounds_are_not_read_to_show_the_last_ones_or_to_order_another(
    call: Call, data: Path, recipe: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.toml").write_text("[schedule]\nevery_hours = 1\n")
    call("start", "--recipe", recipe, "--plan", str(tmp_path / "plan.toml"))
    folder = data / "federation"
    history = History(folder)
    counted = {3: "a", 4: "ab", 5: "b"}
    for number in range(1, 6):
        accepted = tuple({"device": device} for device in counted.get(number, "abc"))
        record = Record(version=number, started="2026-01-02T03:04:05+00:00", accepted=accepted)
        history.save(Completed(record, history.last().flat))
    for number in range(3):  # whoever reads one finds no file
        path = folder / "rounds" / f"{number:06}" / "round.json"
        path.unlink()
        path.mkdir()
    with pytest.raises(IsADirectoryError):
        history.records()
    monkeypatch.setattr("server.federation.overview.MOST_ROUNDS", 3)
    assert [row["round"] for row in round_rows(folder, [])] == [5, 4, 3]
    devices = [Device(id=name, name=name, joined=datetime.now(UTC), node=None) for name in "ab"]
    assert [row["last_round"] for row in device_rows(devices, None, folder)] == [4, 5]
    service = SimpleNamespace(settings=Settings(data_dir=data), registry=registry)
    Federating(cast(Service, service))._order_if_due()
    assert orders.ordered(folder) == 6
    assert [record and record.version for record in map(history.record, (3, 5, 6))] == [3, 5, None]


def test_an_order_that_nobody_can_read_does_not_end_the_servers_watch(
    call: Call, data: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("start", "--recipe", recipe)
    folder, is_run, looks = data / "federation", threading.Event(), threading.Semaphore(0)
    read = orders.ordered
    monkeypatch.setattr("server.federation.orders.ordered", lambda folder: (looks.release(), read(folder))[1])
    monkeypatch.setattr("server.federation.federation._LOOK_SECONDS", 0.01)
    monkeypatch.setattr(SuperLink, "start", lambda self: None)
    monkeypatch.setattr(Federation, "_run", lambda self, patience: is_run.set())
    (folder / "order.json").write_text("three")
    with Federation(folder):
        assert all(looks.acquire(timeout=20) for _ in range(2)), "it looks once, and again"
        assert not is_run.is_set()
        orders.order(folder, 1)
        assert is_run.wait(20)


def test_the_start_is_the_encoders_weights_with_the_recipes_head(registry: Registry, recipe: str) -> None:
    begun = open_start(registry, "default", load_recipe(recipe))
    again = open_start(registry, "default", load_recipe(recipe))
    np.testing.assert_array_equal(begun.flat, again.flat)
    state = unpack(begun.flat, begun.manifest)
    for name, value in load_encoder("default").backbone.state_dict().items():
        if "num_batches" not in name:
            np.testing.assert_array_equal(state[f"online.backbone.{name}"].numpy(), value.numpy())
    assert any(name.startswith("online.") and ".backbone." not in name for name in state)
    assert (begun.start.licence, begun.start.source) == ("Apache-2.0", "default")


def test_begun_again_the_plan_changes_and_the_rounds_stay(call: Call, data: Path, recipe: str, tmp_path: Path) -> None:
    call("start", "--recipe", recipe)
    history = History(data / "federation")
    history.save(Completed(Record(version=1), history.last().flat))
    plan = tmp_path / "plan.toml"
    plan.write_text('[aggregator]\nname = "trimmed_mean"\n\n[schedule]\nevery_hours = 6\n')
    status, out, _ = call("start", "--recipe", recipe, "--plan", str(plan), "--rounds", "2")
    assert (status, "1 rounds are completed" in out, "ordered: rounds up to 3" in out) == (0, True, True)
    read = Plan.from_json((data / "federation" / "plan.json").read_text())
    assert read.aggregator == TrimmedMeanConfig()
    operation = Operation.load(data / "federation")
    assert operation is not None
    assert operation.schedule == ScheduleConfig(every_hours=6.0)
    status, _, errors = call("start", "--recipe", recipe, "--from", "default")
    assert status == 2
    assert "holds another federation" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start"], "give --recipe RECIPE, --from SOURCE or both"),
        (["start", "--from", "nothing"], "there is no 'nothing' to begin with: give a version (v1), a checkpoint"),
        (["start", "--from", "v3", "--recipe", "tiny-moco-matched"], "there is no version v3: the registry is empty"),
        (["start", "--from", "default"], "default has no recipe to train on by: give --recipe"),
        (["start", "--from", "default", "--recipe", "moco-mobilenetv2-matched"], "the recipe trains a mobilenetv2"),
        (["start", "--recipe", "no-such"], "recipe 'no-such' is neither a TOML file nor one of"),
        (["start", "--recipe", "tiny-moco-matched", "--plan", "none.toml"], "plan none.toml: No such file"),
        (["status"], "there is no folder"),
        (["round"], "there is no folder"),
        (["token", "--uses", "0"], "0 uses; expected 1 to 1,000,000"),
        (["token", "--uses", "99999999999999999999"], "99999999999999999999 uses; expected 1 to 1,000,000"),
        (["token", "--hours", "-1"], "-1 hours; expected more than 0, up to a year"),
        (["token", "--hours", "nan"], "nan hours; expected more than 0, up to a year"),
        (["token", "--hours", "1e30"], "1e+30 hours; expected more than 0, up to a year"),
        (["token", "--name", "a\nb"], "printable characters"),
    ],
)
def test_what_a_person_can_mend_is_one_line(call: Call, words: list[str], said: str) -> None:
    status, _, errors = call(*words)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("lowssl federation: ")
    assert said in errors


def test_a_number_that_python_does_not_read_is_told_as_any_other(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("0", "\N{SUPERSCRIPT TWO}"):
        with pytest.raises(SystemExit):
            call("round", "--count", text)
        said = capsys.readouterr().err
        assert said.endswith(f"argument --count: {text}: expected a whole number, 1 to 100,000\n")


def test_a_file_is_no_servers_folder(call: Call, data: Path) -> None:
    data.write_text("of another program")
    for words in (["token"], ["start"], ["status"]):
        status, _, errors = call(*words)
        assert (status, errors.count("\n")) == (2, 1)
        assert f"--data-dir {data} is a file" in errors
    assert data.read_text() == "of another program"


def test_where_nothing_has_begun_it_says_how(call: Call, data: Path) -> None:
    data.mkdir()
    for words in (["round"], ["stop"], ["history"], ["version", "1"]):
        status, _, errors = call(*words)
        assert status == 2
        assert "lowssl federation start begins one" in errors
    assert "not begun" in call("status")[1]
    assert "no device has an id" in call("release", "abc")[2]


def test_a_version_without_weights_is_nothing_to_begin_with(
    call: Call, registry: Registry, tmp_path: Path, recipe: str
) -> None:
    add_version(registry, tmp_path)
    status, _, errors = call("start", "--from", "v1", "--recipe", recipe)
    assert (status, "v1 has no weights to train on from, only onnx" in errors) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = [", "Invalid value"),
        ("foo = 1", "unknown key foo; a plan has aggregator, rounds, screening, privacy, schedule, versions"),
        ("[rounds]\nfoo = 1", "unknown key rounds.foo; rounds has seconds"),
        ("[rounds]\nup = 'int9'", "rounds.up is 'int9'; it is one of"),
        ("[rounds]\nmin_devices = 3\nmax_devices = 2", "rounds.max_devices is 2; it is at least min_devices, 3"),
        ("aggregator = 3", "aggregator is 3; it is a table"),
        ("[aggregator]\nname = 'mode'", "aggregator.name is 'mode'; it is one of fedavg"),
        ("[aggregator]\nname = 'median'\nmomentum = 0.5", "unknown key aggregator.momentum; median has none"),
        ("[aggregator]\nmomentum = 3.0", "aggregator.momentum is 3.0; it is from 0 to below 1"),
        ("[aggregator]\nmomentum = 'a'", "aggregator.momentum is 'a'; it is a number"),
        ("[schedule]\nevery_hours = 0", "schedule.every_hours is 0.0; it is a number above 0"),
        ("[schedule]\nevery_hours = 1e13", "every_hours is 10000000000000.0; it is a number above 0, up to 8784"),
        ("[schedule]\ndevices = 0", "schedule.devices is 0; it is a whole number from 1"),
        ("[screening.comparison]\nreplise = 3", "unknown key screening.comparison.replise; screening.comparison has"),
        ("privacy = 1", "privacy is 1; it is a table"),
        ("[versions]\nevery = true", "versions.every is True; it is a whole number"),
        ("[versions]\npromote = 1", "versions.promote is 1; it is true or false"),
        ("[privacy]\nsampling_rate = 0.1\ndelta = 1e-5\nmax_epsilon = 3", "privacy is given exactly where"),
        ("[aggregator]\nname = 'private_mean'\nclip = 1.0\nnoise_multiplier = 1.0", "privacy is given exactly where"),
    ],
)
def test_a_wrong_plan_is_told_by_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"plan {path}: ")
    assert said in str(caught.value)
    assert "recipe" not in str(caught.value)


def test_a_plan_is_read_whole_and_what_it_leaves_out_is_usual(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("")
    assert read_plan(path) == PlanFile()
    path.write_text(
        "[aggregator]\nname = 'private_mean'\nclip = 1.0\nnoise_multiplier = 1.0\n"
        "[privacy]\nsampling_rate = 0.1\ndelta = 1e-5\nmax_epsilon = 3\n"
        "[schedule]\ndevices = 3\nnew_images = 50\n[versions]\nevery = 5\npromote = false\n"
    )
    read = read_plan(path)
    assert isinstance(read.plan.aggregator, PrivateMeanConfig)
    assert (read.plan.screening.comparison, read.plan.screening.max_staleness) == (None, 0)
    assert read.schedule == ScheduleConfig(devices=3, new_images=50)
    assert read.versions == VersionsConfig(every=5, promote=False)
    operation = Operation(
        start=Start(source="v2", parent="v2", resize=55), schedule=read.schedule, versions=read.versions
    )
    operation.save(tmp_path)
    assert Operation.load(tmp_path) == operation
    (tmp_path / "operation.json").write_text("{")
    with pytest.raises(UserError, match=r"operation\.json cannot be read"):
        Operation.load(tmp_path)
