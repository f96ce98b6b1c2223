"""The tables: versions with their files, events, the keys of the API, and who may join the federation and has."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, DateTime, Dialect, ForeignKey, Index, MetaData, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator


class Moment(TypeDecorator[datetime]):
    """A point in time, aware and in UTC on both databases; SQLite itself keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """What is stored; a time without a zone is a mistake of the caller."""
        if value is None:
            return None
        assert value.tzinfo is not None, "times are aware"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """What was stored, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """What all tables share: names of constraints by rule, so that later migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it by this name
        str: Text(),
        datetime: Moment(),
        dict[str, Any]: JSON(none_as_null=True),
    }


class VersionRow(Base):
    """One version of the encoder. Rows are never deleted; the files of old ones are (`FileRow`)."""

    __tablename__ = "versions"
    __table_args__ = (
        CheckConstraint("kind IN ('pretrained', 'federated', 'imported')", name="kind"),
        CheckConstraint("state IN ('candidate', 'serving', 'refused', 'retired')", name="state"),
        # At most one row is serving, whatever the code does.
        Index(
            "ix_versions_serving",
            "state",
            unique=True,
            sqlite_where=text("state = 'serving'"),
            postgresql_where=text("state = 'serving'"),
        ),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    state: Mapped[str]
    parent: Mapped[int | None] = mapped_column(ForeignKey("versions.number"))
    created: Mapped[datetime]
    description: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    facts: Mapped[dict[str, Any]]
    files: Mapped[list["FileRow"]] = relationship(
        lazy="selectin", cascade="all, delete-orphan", order_by="FileRow.role"
    )


class FileRow(Base):
    """A file of a version by its role ("onnx", "encoder"); its content lies in the store under its hash."""

    __tablename__ = "files"

    version: Mapped[int] = mapped_column(ForeignKey("versions.number"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int] = mapped_column(BigInteger())


class EventRow(Base):
    """What happened to a version, in the order of `id`."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime]
    version: Mapped[int] = mapped_column(ForeignKey("versions.number"), index=True)
    action: Mapped[str]
    who: Mapped[str]
    why: Mapped[str]
    report: Mapped[dict[str, Any] | None]


class ApiKeyRow(Base):
    """A key of the API: the public part is its id, of the secret only the SHA-256 is known."""

    __tablename__ = "api_keys"
    __table_args__ = (CheckConstraint("role IN ('embed', 'operate', 'admin')", name="role"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    hash: Mapped[str]
    name: Mapped[str]
    role: Mapped[str]
    created: Mapped[datetime]
    last_used: Mapped[datetime | None]
    revoked: Mapped[datetime | None]
    requests_per_minute: Mapped[int | None]


class JoinTokenRow(Base):
    """A token by which devices join; of its secret only the SHA-256 is known."""

    __tablename__ = "join_tokens"

    id: Mapped[str] = mapped_column(primary_key=True)
    hash: Mapped[str]
    name: Mapped[str]
    uses_left: Mapped[int]
    created: Mapped[datetime]
    expires: Mapped[datetime]


class DeviceRow(Base):
    """A device of the federation by its id, which follows from its key."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    public_key: Mapped[str]
    token: Mapped[str] = mapped_column(ForeignKey("join_tokens.id"))
    joined: Mapped[datetime]
    # Flower's id of it, up to 2^64; absent while Flower has not been told of it.
    node: Mapped[str | None]
    new_images: Mapped[int]
    told: Mapped[datetime | None]
