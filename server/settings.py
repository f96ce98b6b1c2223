"""The server's settings: from a TOML file, the environment and flags, read strictly, each described once."""

import contextlib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from lowssl_core.errors import UserError

PREFIX = "LOWSSL_SERVER_"
# Settings that may hold a password: never shown.
SECRET = ("database_url", "files_url")


def _split(value: object) -> object:
    """The environment has no lists: 'a, b' is ('a', 'b')."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _database_url(value: str) -> str:
    """Refuse what SQLAlchemy could not open, without quoting it: it may hold a password."""
    try:
        backend = make_url(value).get_backend_name()
    except ArgumentError:
        backend = ""
    if backend not in ("sqlite", "postgresql"):
        raise ValueError("expected a URL like postgresql://USER:PASSWORD@HOST/NAME or sqlite:////PATH")
    return value


def _origin(value: str) -> str:
    scheme, separator, host = value.partition("://")
    if value != "*" and (scheme not in ("http", "https") or not separator or not host or "/" in host):
        raise ValueError(f"{value!r} is no origin; expected one like https://example.org, or *")
    return value


class Settings(BaseSettings):
    """Everything a server can be told. Made by `load_settings`, or directly with keywords in Python."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    data_dir: Path = Field(Path("lowssl-data"), description="Folder of the registry: its database and its files.")
    database_url: Annotated[str, AfterValidator(_database_url)] | None = Field(
        None, description="The registry's database, by SQLAlchemy's URL; without it SQLite in the data folder."
    )
    files_url: str | None = Field(
        None, description="Where the registry's files are, by fsspec's URL (s3://...); without it the data folder."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen at; 0.0.0.0 is every one.")
    port: int = Field(8080, ge=0, le=65_535, description="Port to listen at; 0 takes a free one.")
    tls_certificate: Path | None = Field(
        None, description="Certificate (PEM, with those between it and its authority) to speak TLS with; with tls_key."
    )
    tls_key: Path | None = Field(None, description="Private key of tls_certificate (PEM).")
    federation: bool = Field(
        False,
        description="Whether devices may join and train the encoder on; the port then speaks TLS, without "
        "tls_certificate with a self-signed one.",
    )
    require_keys: bool | None = Field(
        None, description="Whether calls need an API key; without it, exactly when the address is not loopback."
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="How many requests one key may send a minute, unless it has its own; without it, any."
    )
    max_body_bytes: int = Field(10_000_000, ge=1024, description="The largest body of a request, in bytes.")
    max_images: int = Field(64, ge=1, le=4096, description="How many images one request may hold.")
    max_pixels: int = Field(
        50_000_000, ge=4096, description="The largest JPEG, in pixels; other formats may have half of that."
    )
    max_in_flight: int = Field(64, ge=1, description="Requests worked on or waiting; any more are answered 503.")
    request_seconds: float = Field(
        10.0, gt=0, le=600, description="How long a body's upload may take, and then its answer."
    )
    workers: int | None = Field(
        None, ge=1, le=256, description="Threads that decode and run the encoder; without it, one for each core."
    )
    execution: Literal["auto", "pool", "batches"] = Field(
        "auto", description="pool: each worker runs its image; batches: images run together; auto: measured at start."
    )
    poll_seconds: float = Field(
        2.0, ge=0.1, le=3600, description="How often the registry is asked whether another version serves."
    )
    probe: Path | None = Field(
        None, description="Images that promotion judges by, without labels; without it, photographs that come along."
    )
    probe_labelled: Path | None = Field(
        None, description="Class folders that promotion judges by k-NN on; without it, it does not."
    )
    cors_origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split), NoDecode] = (
        Field((), description="Web origins whose pages may call the server; separated by commas in the environment.")
    )
    log_format: Literal["json", "text"] | None = Field(
        None,
        description="json: one object a line; text: for people; without it, text on a terminal, else json.",
    )

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        return self

    @property
    def federation_folder(self) -> Path:
        """Where the federation's state is."""
        return self.data_dir.expanduser().absolute() / "federation"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine's own programs can reach the server."""
        with contextlib.suppress(ValueError):  # a name
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    @property
    def needs_keys(self) -> bool:
        """Whether calls need an API key."""
        return not self.is_loopback if self.require_keys is None else self.require_keys


def load_settings(flags: Mapping[str, object], config: Path | None) -> Settings:
    """The settings of a TOML file, overridden by the environment (LOWSSL_SERVER_PORT=80), overridden by flags.

    Args:
        flags: by a setting's name; None stands for a flag that was not given.
        config: the TOML file, if any.

    Raises:
        UserError: a key that does not exist or a value that is not accepted, with where it was given.
    """
    given: dict[str, tuple[str, object]] = {}  # name: (where it was given, as the user wrote it; value)
    if config is not None:
        content = _read_file(config)
        given |= {name: (f"{config}: {name} = {_shown(name, value)}", value) for name, value in content.items()}
    for variable, text in os.environ.items():
        if variable.startswith(PREFIX) and text:
            name = variable.removeprefix(PREFIX).lower()
            _check_name(name, variable)
            given[name] = (f"{variable}={_shown(name, text)}", text)
    for name, value in flags.items():
        if value is not None:
            assert name in Settings.model_fields
            given[name] = (f"--{name.replace('_', '-')} {_shown(name, value)}", value)
    try:
        return Settings(**{name: value for name, (_, value) in given.items()})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of several settings together
            raise UserError(first["msg"].removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        own = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else _accepted(name)
        raise UserError(f"{given[name][0]}: {own}") from None


def settings_table() -> str:
    """The settings as a Markdown table, for the documentation."""
    lines = ["| Setting | Environment | Accepted | Default | |", "|---|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or field.default == () else f"`{field.default}`"
        lines.append(
            f"| `{name}` | `{PREFIX}{name.upper()}` | {_accepted(name).removeprefix('expected ')} | {default} "
            f"| {field.description} |"
        )
    return "\n".join(lines)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    for name, value in content.items():
        _check_name(name, f"{path}: {name}")
        if isinstance(value, bool) and Settings.model_fields[name].annotation not in (bool, bool | None):
            raise UserError(f"{path}: {name} = {value}: {_accepted(name)}")  # pydantic takes true for 1
    return content


def _shown(name: str, value: object) -> object:
    return "..." if name in SECRET else value


def _check_name(name: str, where: str) -> None:
    if name not in Settings.model_fields:
        raise UserError(f"{where}: no such setting; there are {', '.join(Settings.model_fields)}")


def _accepted(name: str) -> str:
    """What a setting accepts, in words."""
    field = Settings.model_fields[name]
    kind = field.annotation
    if type(None) in get_args(kind):  # X | None
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    bounds = {key: getattr(one, key) for one in field.metadata for key in ("gt", "ge", "le") if hasattr(one, key)}
    if get_origin(kind) is Literal:
        return f"expected {' or '.join(get_args(kind))}"
    if name == "cors_origins":
        return "expected a list of origins"
    words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}
    said = f"expected {words[kind]}" if kind in words else "expected another value"
    if "le" in bounds:
        low = f"{bounds['ge']} to" if "ge" in bounds else f"above {bounds['gt']}, up to"
        return f"{said}, {low} {bounds['le']:,}"
    return f"{said}, at least {bounds['ge']:,}" if "ge" in bounds else said
