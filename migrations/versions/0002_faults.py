"""What outlives faults: where a job failed last, and pictures held on a worker's disk."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("avoid_session", sa.String(length=32), nullable=True))
    op.add_column(
        "sessions", sa.Column("spooled", sa.Integer(), server_default="0", nullable=False)
    )


def downgrade() -> None:
    op.drop_column("sessions", "spooled")
    op.drop_column("jobs", "avoid_session")
