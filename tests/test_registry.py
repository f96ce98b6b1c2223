import collections
import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres import new_database
from registry_data import Place, add, check_whole, description, report, write_file
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from lowssl_core.errors import UserError
from server.database.engine import Database, DatabaseUnavailableError
from server.database.tables import ApiKeyRow, Base
from server.registry import pruning
from server.registry.blobs import BlobStore, DamagedFileError, Lying
from server.registry.registry import Registry, open_registry
from server.registry.version import StaleReportError, StoredFile, UnknownVersionError

WHO = "a test"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = None if request.param == "sqlite" else new_database()
    return Place(tmp_path / "data 100%?#", url)


@pytest.fixture
def registry(place: Place) -> Iterator[Registry]:
    opened = open_registry(place)
    yield opened
    opened.close()


def test_what_was_added_is_found_again_by_another_process_opening_the_registry(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    files = {"onnx": write_file(tmp_path, b"graph", "a"), "encoder": write_file(tmp_path, b"weights", "b")}
    first = registry.add(
        kind="pretrained", description=description("köln 猫"), files=files, metrics={"loss": 0.1}, who=WHO, why="a\nb"
    )
    second = registry.add(
        kind="federated", description=description(), files=files, parent="v1", facts={"devices": [1, None]}, who=WHO
    )
    again = open_registry(place)
    assert again.versions() == [first, second] == [again.version("v1"), again.version("v2")]
    assert (first.name, first.state, first.kind, first.parent) == ("v1", "candidate", "pretrained", None)
    assert (second.parent, second.facts, second.metrics) == ("v1", {"devices": [1, None]}, {})
    assert first.description == replace(description("köln 猫"), version="v1")
    assert again.fetch(first).read_bytes() == b"graph"
    assert again.fetch(second, "encoder").read_bytes() == b"weights"
    assert [(event.version, event.action, event.who, event.why) for event in again.events()] == [
        ("v1", "add", WHO, "a\nb"),
        ("v2", "add", WHO, ""),
    ]
    assert timedelta(0) <= datetime.now(UTC) - again.version("v1").created < timedelta(minutes=1)
    assert first.created.utcoffset() == timedelta(0)
    assert again.serving() is None
    again.close()


def test_promotion_replaces_what_serves_and_rollback_goes_back_one_promotion_more_each_time(
    registry: Registry, tmp_path: Path
) -> None:
    for content in (b"1", b"2", b"3"):
        add(registry, tmp_path, content)
    for name in ("v1", "v2", "v3"):
        assert registry.promote(name, who=WHO).state == "serving"
    assert [registry.rollback(who=WHO).name for _ in range(2)] == ["v2", "v1"]
    with pytest.raises(UserError, match="did so before v1"):
        registry.rollback(who=WHO)
    # Promoted after the rollbacks: what was undone is not returned to.
    registry.promote("v3", who=WHO)
    assert registry.rollback(who=WHO).name == "v1"
    assert [version.state for version in registry.versions()] == ["serving", "retired", "retired"]
    assert [version.name for version in registry.versions(state="retired")] == ["v2", "v3"]
    assert [(event.action, event.why) for event in registry.events("v2")] == [
        ("add", ""),
        ("promote", ""),
        ("retire", "replaced by v3"),
        ("rollback", ""),
        ("retire", "replaced by v1"),
    ]


class Model:
    """The registry as its documentation has it: states, which versions have files, and who served, as undo has it.

    An operation returns whether the registry should do it.
    """

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.with_files: set[str] = set()
        self.served: list[str] = []

    def add(self, name: str) -> bool:
        self.states[name] = "candidate"
        self.with_files.add(name)
        return True

    def promote(self, name: str) -> bool:
        if self.states.get(name, "serving") == "serving" or name not in self.with_files:
            return False
        self._serve(name)
        self.served.append(name)
        return True

    def refuse(self, name: str) -> bool:
        if self.states.get(name, "serving") == "serving":
            return False
        if self.states[name] == "candidate":
            self.states[name] = "refused"
        return True

    def rollback(self) -> bool:
        back = self._back()
        if back is None:
            return False
        self.served = self.served[: back + 1]
        self._serve(self.served[-1])
        return True

    def prune(self, keep: int) -> bool:
        back = self._back()
        spared = None if back is None else self.served[back]
        old = [name for name, state in self.states.items() if state in ("retired", "refused") and name != spared]
        old = [name for name in old if name in self.with_files]
        self.with_files.difference_update(old[: max(0, len(old) - keep)])
        return True

    def _back(self) -> int | None:
        places = range(len(self.served) - 2, -1, -1)
        able = (at for at in places if self.served[at] in self.with_files and self.served[at] != self.served[-1])
        return next(able, None)

    def _serve(self, name: str) -> None:
        self.states = {other: "retired" if state == "serving" else state for other, state in self.states.items()}
        self.states[name] = "serving"


def test_random_operations_do_what_a_plain_model_does(registry: Registry, tmp_path: Path) -> None:
    rng, model = random.Random(5), Model()
    done = collections.Counter[tuple[str, bool]]()
    for step in range(250):
        count = len(model.states)
        name, keep, content = f"v{rng.randint(1, count + 1)}", rng.randrange(4), f"{step % 7}".encode()
        action = rng.choices(["add", "promote", "refuse", "rollback", "prune"], [4, 5, 2, 3, 1])[0]
        operations: dict[str, tuple[Callable[[], bool], Callable[[], object]]] = {
            "add": (partial(model.add, f"v{count + 1}"), partial(add, registry, tmp_path, content)),
            "promote": (partial(model.promote, name), partial(registry.promote, name, who=WHO)),
            "refuse": (partial(model.refuse, name), partial(registry.refuse, name, who=WHO)),
            "rollback": (model.rollback, partial(registry.rollback, who=WHO)),
            "prune": (partial(model.prune, keep), partial(registry.prune, keep=keep, who=WHO)),
        }
        expected, operate = operations[action]
        should = expected()
        with contextlib.nullcontext() if should else pytest.raises(UserError):
            operate()
        done[action, should] += 1
        versions = registry.versions()
        assert {version.name: version.state for version in versions} == model.states, f"step {step}: {action} {name}"
        assert {version.name for version in versions if version.files} == model.with_files, f"step {step}: {action}"
    check_whole(registry)
    assert len(done) == 8, "each operation, and each refusal there is"


def test_the_database_itself_lets_no_two_versions_serve(registry: Registry, tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        add(registry, tmp_path, content)
    registry.promote("v1", who=WHO)
    with pytest.raises(IntegrityError), registry.database.write() as session:
        session.execute(text("UPDATE versions SET state = 'serving' WHERE number = 2"))
    with pytest.raises(IntegrityError), registry.database.write() as session:
        session.execute(text("UPDATE versions SET state = 'asleep' WHERE number = 2"))
    with pytest.raises(IntegrityError), registry.database.write() as session:
        session.execute(text("UPDATE versions SET parent = 77 WHERE number = 2"))
    check_whole(registry)


def test_a_report_is_kept_with_its_event_and_its_figures_become_metrics(registry: Registry, tmp_path: Path) -> None:
    for content in (b"1", b"2", b"3"):
        add(registry, tmp_path, content)
    registry.promote("v1", who=WHO, report=report("v1", passed=True))
    bad = report("v2", passed=False, against="v1")
    assert registry.refuse("v2", who=WHO, report=bad).state == "refused"
    assert registry.version("v2").metrics == {"rankme": 1.5}
    assert registry.events("v2")[-1].report == bad
    # Served in spite of the report: the event says so.
    registry.promote("v2", who="someone", why="we know better", report=bad)
    forced = registry.events("v2")[-1]
    assert (forced.action, forced.who, forced.why, forced.report) == ("force", "someone", "we know better", bad)


def test_a_report_against_another_version_than_serves_now_promotes_nothing(registry: Registry, tmp_path: Path) -> None:
    for content in (b"1", b"2", b"3"):
        add(registry, tmp_path, content)
    early = report("v3", passed=True, against=None)
    registry.promote("v1", who=WHO)
    with pytest.raises(StaleReportError, match="judged against no version, but meanwhile v1 serves"):
        registry.promote("v3", who=WHO, report=early)
    assert registry.version("v3").state == "candidate"
    assert registry.promote("v3", who=WHO, report=report("v3", passed=True, against="v1")).state == "serving"


def test_a_version_that_served_stays_one_to_roll_back_to_when_the_gate_refuses_it(
    registry: Registry, tmp_path: Path
) -> None:
    for content in (b"1", b"2"):
        add(registry, tmp_path, content)
        registry.promote(f"v{content.decode()}", who=WHO)
    assert registry.refuse("v1", who=WHO, report=report("v1", passed=False, against="v2")).state == "retired"
    assert registry.rollback(who=WHO).name == "v1"
    with pytest.raises(UserError, match="v1 serves"):
        registry.refuse("v1", who=WHO)


def test_pruning_keeps_what_serves_may_serve_or_is_shared_and_all_history(registry: Registry, tmp_path: Path) -> None:
    contents = [b"old", b"shared", b"before", b"now", b"bad", b"shared"]
    for content in contents:
        add(registry, tmp_path, content)
    for name in ("v1", "v2", "v3", "v4"):
        registry.promote(name, who=WHO)
    registry.refuse("v5", who=WHO)
    everything = registry.events()
    planned = registry.prune(keep=0, who=WHO, dry_run=True)
    assert registry.events() == everything
    done = registry.prune(keep=0, who=WHO, why="space")
    assert planned == done
    # v3 is what a rollback returns to; v6 is a candidate and shares v2's content.
    assert (done.versions, done.files, done.bytes) == (("v1", "v2", "v5"), 2, len(b"old") + len(b"bad"))
    assert [bool(version.files) for version in registry.versions()] == [False, False, True, True, False, True]
    assert registry.fetch(registry.version("v6")).read_bytes() == b"shared"
    assert registry.events("v2")[-1].why == "space"
    with pytest.raises(UserError, match="v1 has no file 'onnx': its files were pruned"):
        registry.promote("v1", who=WHO)
    registry.rollback(who=WHO)
    with pytest.raises(UserError, match="did so before v3"):
        registry.rollback(who=WHO)
    assert registry.prune(keep=0, who=WHO).versions == ("v4",)
    check_whole(registry)


def test_a_file_that_nothing_names_is_removed_when_it_is_old(registry: Registry, place: Place, tmp_path: Path) -> None:
    add(registry, tmp_path, b"named")
    stored = [path for path in (place.data_dir / "files").rglob("*") if path.is_file()]
    assert len(stored) == 1
    unnamed = [stored[0].parent / ("0" * 64), stored[0].parent / f".{'1' * 64}.part"]
    foreign = place.data_dir / "files" / "notes.txt"
    for path in (*unnamed, foreign):
        path.write_bytes(b"left behind")
    assert registry.prune(keep=0, who=WHO).files == 0
    old = time.time() - 3700
    for path in (*unnamed, foreign, stored[0]):
        os.utime(path, (old, old))
    assert registry.prune(keep=0, who=WHO, dry_run=True).files == 2
    assert registry.prune(keep=0, who=WHO).files == 2
    assert sorted(path for path in (place.data_dir / "files").rglob("*") if path.is_file()) == sorted(
        [stored[0], foreign]
    )
    with pytest.raises(UserError, match="keep is -1"):
        registry.prune(keep=-1, who=WHO)


def test_a_file_removed_between_storing_and_naming_it_is_stored_again(
    registry: Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process prunes at the worst moment: the file lies there, and no version names it yet."""
    monkeypatch.setattr(pruning, "UNNAMED_AGE", timedelta(0))
    other, put = open_registry(place), BlobStore.put
    removed: list[int] = []

    def put_and_lose(store: BlobStore, file: Path) -> StoredFile:
        stored = put(store, file)
        if len(removed) < 2:
            removed.append(other.prune(keep=0, who="another").files)
        return stored

    monkeypatch.setattr(BlobStore, "put", put_and_lose)
    version = add(registry, tmp_path, b"weights")
    assert removed == [1, 1]
    assert registry.fetch(version).read_bytes() == b"weights"
    other.close()


def test_a_file_named_between_looking_and_removing_stays(
    registry: Registry, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: pruning has found a file that nothing names, and then another process names it."""
    monkeypatch.setattr(pruning, "UNNAMED_AGE", timedelta(0))
    add(registry, tmp_path, b"weights")
    registry.refuse("v1", who=WHO)
    other, look = open_registry(place), BlobStore.listing

    def look_and_be_late(store: BlobStore) -> list[Lying]:
        found = look(store)
        add(other, tmp_path, b"weights")
        return found

    monkeypatch.setattr(BlobStore, "listing", look_and_be_late)
    assert registry.prune(keep=0, who=WHO).files == 0
    assert registry.fetch(registry.version("v2")).read_bytes() == b"weights"
    check_whole(registry)
    other.close()


def test_a_version_whose_file_is_gone_cannot_serve_and_a_damaged_one_is_named(
    registry: Registry, place: Place, tmp_path: Path
) -> None:
    version = add(registry, tmp_path, b"weights")
    path = registry.fetch(version)
    path.write_bytes(b"Weights")
    with pytest.raises(DamagedFileError, match=r"v1 \(onnx\): its file .* is damaged"):
        registry.fetch(version)
    path.unlink()
    with pytest.raises(UserError, match=r"v1 cannot serve: its file .* is not in the store"):
        registry.promote("v1", who=WHO)
    # Adding the same content again mends both.
    add(registry, tmp_path, b"weights")
    registry.promote("v1", who=WHO)
    check_whole(registry)


def test_a_name_that_no_version_has_is_refused(registry: Registry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    calls: list[Callable[[str], object]] = [
        registry.version,
        registry.events,
        lambda name: registry.promote(name, who=WHO),
        lambda name: registry.refuse(name, who=WHO),
        lambda name: add(registry, tmp_path, parent=name),
    ]
    for name in ("v3", "v0", "v01", "1", "", "v-1", "v1 ", "v99999999999999999999", "v1\n", "v²"):
        for call in calls:
            with pytest.raises(UnknownVersionError, match="there is no version"):
                call(name)
    assert len(registry.versions()) == 1


def test_words_that_a_database_or_a_terminal_cannot_take_are_refused(registry: Registry, tmp_path: Path) -> None:
    add(registry, tmp_path)
    calls: list[Callable[[str], object]] = [
        lambda words: registry.promote("v1", who=WHO, why=words),
        lambda words: registry.refuse("v1", who=words),
        lambda words: registry.rollback(who=WHO, why=words),
        lambda words: registry.prune(keep=0, who=words),
        lambda words: add(registry, tmp_path, why=words),
    ]
    for words in ("a\0b", "\ud800", "\x1b[31mred", "x" * 2001):
        for call in calls:
            with pytest.raises(UserError, match=r"who|why"):
                call(words)
        with pytest.raises(UserError, match=r"^name h"):
            registry.add(kind="imported", description=description(words), files={}, who=WHO)
    assert len(registry.events()) == 1


def test_figures_that_json_cannot_hold_are_refused_before_anything_is_stored(
    registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        add(registry, tmp_path, metrics={"loss": math.nan})
    with pytest.raises(UserError, match=r"no version that could serve|no version serves"):
        registry.rollback(who=WHO)
    assert registry.versions() == []


def test_the_tables_are_those_that_the_migrations_make(registry: Registry) -> None:
    with registry.database.read() as session:
        migrations = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(migrations, Base.metadata) == []


def test_a_database_of_a_newer_lowssl_is_refused_and_left_alone(registry: Registry, place: Place) -> None:
    with registry.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UserError, match=r"schema 9999, which a newer LowSSL made.*update LowSSL") as caught:
        open_registry(place)
    assert "\n" not in str(caught.value)
    with registry.database.read() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_a_writing_transaction_that_fails_leaves_nothing(registry: Registry) -> None:
    key = {"id": "k1", "hash": "00", "name": "camera", "role": "embed", "created": datetime.now(UTC)}

    def fail() -> None:
        with registry.database.write() as session:
            session.add(ApiKeyRow(**key))
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with registry.database.read() as session:
        assert session.get(ApiKeyRow, "k1") is None
    with registry.database.write() as session:
        session.add(ApiKeyRow(**key))
    with registry.database.read() as session:
        row = session.get_one(ApiKeyRow, "k1")
        assert (row.created, row.revoked, row.requests_per_minute) == (key["created"], None, None)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:secret@host/db",
        "sqlite://",
        "sqlite:///:memory:",
        "nonsense secret",
        "postgresql+asyncpg://me:secret@h/d",
    ],
)
def test_a_database_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UserError, match="sqlite:///FILE or postgresql://") as caught:
        Database(url)
    assert "secret" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r"^database postgresql") as caught:
        Database("postgresql://me:secret@/db?host=/nowhere")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "text").write_text("this is no database, only text that is long enough to be looked at as one" * 20)
    with pytest.raises(UserError, match="file is not a database"):
        Database(f"sqlite:///{tmp_path / 'text'}")
