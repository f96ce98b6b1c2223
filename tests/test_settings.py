"""Settings: file, environment and flags override each other in this order, and what is wrong is refused by name."""

from pathlib import Path

import pytest

from lowssl_core.errors import UserError
from server.settings import Settings, load_settings, settings_table


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LOWSSL_SERVER_{name.upper()}", raising=False)


def _write(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_nothing_need_be_set() -> None:
    settings = load_settings({}, None)
    assert settings == Settings()
    assert (settings.host, settings.max_body_bytes, settings.cors_origins) == ("127.0.0.1", 10_000_000, ())


def test_flags_come_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _write(tmp_path, 'port = 1\nmax_images = 2\nworkers = 3\ncors_origins = ["https://a.org"]')
    monkeypatch.setenv("LOWSSL_SERVER_PORT", "10")
    monkeypatch.setenv("LOWSSL_SERVER_MAX_IMAGES", "20")
    settings = load_settings({"port": 100, "host": None}, config)
    assert (settings.port, settings.max_images, settings.workers, settings.host) == (100, 20, 3, "127.0.0.1")
    assert settings.cors_origins == ("https://a.org",)


def test_the_environment_can_say_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWSSL_SERVER_CORS_ORIGINS", "https://a.org, http://localhost:3000")
    monkeypatch.setenv("LOWSSL_SERVER_REQUIRE_KEYS", "true")
    monkeypatch.setenv("LOWSSL_SERVER_WORKERS", "")
    settings = load_settings({}, None)
    assert settings.cors_origins == ("https://a.org", "http://localhost:3000")
    assert (settings.needs_keys, settings.workers) == (True, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 8080", "prot: no such setting; there are data_dir, "),
        ("[serving]\nport = 1", "serving: no such setting"),
        ('port = "many"', "port = many: expected a whole number, 0 to 65,535"),
        ("port = 70000", "port = 70000: expected a whole number, 0 to 65,535"),
        ("port = true", "port = True: expected a whole number"),
        ("workers = 1.5", "workers = 1.5: expected a whole number, 1 to 256"),
        ('execution = "gpu"', "execution = gpu: expected auto or pool or batches"),
        ("data_dir = 3", "data_dir = 3: expected a path"),
        ('cors_origins = ["example.org"]', "'example.org' is no origin"),
        ('database_url = "mysql://me:hidden@host/x"', "database_url = ...: expected a URL like postgresql://"),
        ("port = ", "--config"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        load_settings({}, _write(tmp_path, text))
    message = str(refusal.value)
    assert said in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert "hidden" not in message


def test_a_wrong_variable_or_flag_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--port -1: expected a whole number, 0 to 65,535$"):
        load_settings({"port": -1}, None)
    monkeypatch.setenv("LOWSSL_SERVER_REQUIRE_KEYS", "perhaps")
    with pytest.raises(UserError, match=r"^LOWSSL_SERVER_REQUIRE_KEYS=perhaps: expected true or false$"):
        load_settings({}, None)
    monkeypatch.delenv("LOWSSL_SERVER_REQUIRE_KEYS")
    monkeypatch.setenv("LOWSSL_SERVER_PROT", "1")
    with pytest.raises(UserError, match="LOWSSL_SERVER_PROT: no such setting"):
        load_settings({}, None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: No such file"):
        load_settings({}, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("host", "require_keys", "needs"),
    [
        ("127.0.0.1", None, False),
        ("127.8.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.0.7", None, True),
        ("example.org", None, True),
        ("127.0.0.1", True, True),
        ("0.0.0.0", False, False),
    ],
)
def test_keys_are_needed_exactly_off_loopback_unless_told_otherwise(
    host: str, require_keys: bool | None, needs: bool
) -> None:
    assert Settings(host=host, require_keys=require_keys).needs_keys is needs


def test_the_table_has_a_line_for_each_setting() -> None:
    lines = settings_table().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == list(Settings.model_fields)
    assert all(line.count("|") == 6 for line in lines)
    assert "`LOWSSL_SERVER_PORT` | a whole number, 0 to 65,535 | `8080`" in "\n".join(lines)
