"""The first tables: versions, files, events, keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "versions",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("created", moment, nullable=False),
        sa.Column("description", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.CheckConstraint("kind IN ('pretrained', 'federated', 'imported')", name="ck_versions_kind"),
        sa.CheckConstraint("state IN ('candidate', 'serving', 'refused', 'retired')", name="ck_versions_state"),
        sa.ForeignKeyConstraint(["parent"], ["versions.number"], name="fk_versions_parent"),
        sa.PrimaryKeyConstraint("number", name="pk_versions"),
    )
    serving = sa.text("state = 'serving'")
    op.create_index(
        "ix_versions_serving", "versions", ["state"], unique=True, sqlite_where=serving, postgresql_where=serving
    )
    op.create_table(
        "files",
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["version"], ["versions.number"], name="fk_files_version"),
        sa.PrimaryKeyConstraint("version", "role", name="pk_files"),
    )
    op.create_index("ix_files_sha256", "files", ["sha256"])
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("time", moment, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["version"], ["versions.number"], name="fk_events_version"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_version", "events", ["version"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created", moment, nullable=False),
        sa.Column("last_used", moment, nullable=True),
        sa.Column("revoked", moment, nullable=True),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.CheckConstraint("role IN ('embed', 'operate', 'admin')", name="ck_api_keys_role"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
