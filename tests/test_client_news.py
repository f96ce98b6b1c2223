"""News of new images: told when worth it, believed by the server's own check, and harmless when they fail."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_client_main import Site, site_at

from client.calls import parse_url
from client.identity import Identity, open_identity
from client.news import News, Told, is_worth_telling
from server.database.engine import Database
from server.federation.joins import create_token, hear, join, list_devices

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path / "server") as site:
        yield site


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return open_identity(tmp_path / "device")


def news_of(site: Site, identity: Identity, clock: Callable[[], float] = lambda: 0.0) -> News:
    path = identity.path.with_name("news.json")
    return News(parse_url(site.url), site.certificate.path, identity, path, clock=clock)


@pytest.mark.parametrize(
    ("told", "minutes", "new_images", "is_worth_it"),
    [
        (None, 0, 0, False),
        (None, 0, 1, True),
        (10, 9, 11, False),  # one by one
        (10, 11, 11, True),
        (10, 0.01, 4, True),  # a round has learned from the others
        (4, 0.01, 0, True),
        (0, 1000, 0, False),
        (10, 59, 10, False),
        (10, 61, 10, True),  # a round that this device was not in made the server forget them
        (10, -500, 11, True),  # the clock was set back
    ],
)
def test_fewer_are_told_at_once_and_more_or_as_many_after_a_while(
    told: int | None, minutes: float, new_images: int, is_worth_it: bool
) -> None:
    before = None if told is None else Told(new_images=told, at=NOW - timedelta(minutes=minutes))
    assert is_worth_telling(before, new_images, NOW) is is_worth_it


def test_the_server_believes_what_a_device_tells(tmp_path: Path, site: Site, identity: Identity) -> None:
    with closing(Database(f"sqlite:///{tmp_path}/registry.sqlite3")) as database:
        token = create_token(database)
        join(database, token=token, public_key=identity.public, name="", register=lambda key, name: 1)
        news = news_of(site, identity)
        for new_images in (24, 24, 25, 8):  # the second and third are too soon
            news.tell(new_images)
        assert [body["new_images"] for body in site.news[identity.device]] == [24, 8]
        for body in site.news[identity.device]:
            hear(database, device=identity.device, **body)
            assert list_devices(database)[0].new_images == body["new_images"]
    told = json.loads(identity.path.with_name("news.json").read_text())
    assert told == {"new_images": 8, "at": body["time"]}
    # Another agent, after a restart, knows what was told.
    news_of(site, identity).tell(9)
    assert len(site.news[identity.device]) == 2


def test_a_failure_is_a_line_in_the_log_and_tried_again_later_and_later(
    site: Site, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    news = news_of(site, identity, lambda: now)
    site.fixed = (401, b'{"detail": "this device has not joined"}')
    attempts = []
    for now in range(0, 60 * 60, 30):
        before = len(caplog.records)
        news.tell(24)
        attempts += [now] * (len(caplog.records) - before)
    assert attempts == [0, 60, 180, 420, 900, 1860]
    said = f"127.0.0.1:{site.port} answered 401 this device has not joined"
    assert set(caplog.messages) == {f"the server was not told of 24 new images: {said}"}
    assert news.status() == {"trouble": said}
    assert not identity.path.with_name("news.json").exists()
    site.fixed, now = None, 2 * 60 * 60
    news.tell(24)
    assert news.status() == {"trouble": ""}
    assert [body["new_images"] for body in site.news[identity.device]] == [24]


def test_another_certificate_is_told_nothing(
    tmp_path: Path, site: Site, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with site_at(tmp_path / "other") as other:
        news = News(parse_url(other.url), site.certificate.path, identity, tmp_path / "news.json")
        news.tell(24)
        assert "its certificate is not trusted" in news.status()["trouble"]
        assert other.news == {}


@pytest.mark.parametrize("text", ["", "[]", '{"new_images": 3}', '{"new_images": 3, "at": "2026-05-04T12:00:00"}'])
def test_a_damaged_memory_of_what_was_told_is_none(site: Site, identity: Identity, text: str) -> None:
    identity.path.with_name("news.json").write_text(text)
    news_of(site, identity).tell(3)
    assert [body["new_images"] for body in site.news[identity.device]] == [3]
