"""The federation's tables: tokens to join by, and devices."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("created", moment, nullable=False),
        sa.Column("expires", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_join_tokens"),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("joined", moment, nullable=False),
        sa.Column("node", sa.Text(), nullable=True),
        sa.Column("new_images", sa.Integer(), nullable=False),
        sa.Column("told", moment, nullable=True),
        sa.ForeignKeyConstraint(["token"], ["join_tokens.id"], name="fk_devices_token"),
        sa.PrimaryKeyConstraint("id", name="pk_devices"),
    )
