"""Schedules and their runs.

Code of 0001 and 0002 goes on working: it has no word to say of either table.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

FINAL = "state IN ('failed', 'skipped', 'succeeded')"
STATES = "state IN ('failed', 'pending', 'running', 'skipped', 'succeeded', 'waiting')"
CHECKS = {
    "kind_known": "kind IN ('due', 'manual')",
    "state_known": STATES,
    "final_has_time": f"({FINAL}) = (finished_at IS NOT NULL)",
    "running_is_held": "(state = 'running') = (holder IS NOT NULL)",
    "held_has_lease": "(holder IS NULL) = (lease_until IS NULL)",
    "begun_has_time": "state IN ('pending', 'skipped') OR started_at IS NOT NULL",
    "skipped_is_unbegun": "state <> 'skipped' OR started_at IS NULL",
}
OPEN = sa.text("finished_at IS NULL")
UNDER_WAY = sa.text("started_at IS NOT NULL AND finished_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("tz", sa.Text(), nullable=False),
        sa.Column("until", sa.String(length=5), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=True),
        sa.Column("catch_up", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("owner", sa.Text(), server_default="", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("last_due", sa.Double(), nullable=True),
        sa.Column("next_due", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    op.create_index("ix_schedules_name", "schedules", ["name"], unique=True)
    op.create_table(
        "schedule_runs",
        sa.Column("schedule_id", sa.String(length=16), nullable=False),
        sa.Column("due_at", sa.Double(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=6), server_default="due", nullable=False),
        sa.Column("state", sa.String(length=9), server_default="pending", nullable=False),
        sa.Column("why", sa.Text(), server_default="", nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("batch_id", sa.String(length=16), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("summary", sa.JSON(none_as_null=True), nullable=True),
        *(
            sa.CheckConstraint(check, name=op.f(f"ck_schedule_runs_{name}"))
            for name, check in CHECKS.items()
        ),
        sa.ForeignKeyConstraint(
            ["schedule_id"],
            ["schedules.id"],
            name=op.f("fk_schedule_runs_schedule_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("schedule_id", "due_at", name=op.f("pk_schedule_runs")),
    )
    for name, where, unique in (
        ("ix_schedule_runs_open", OPEN, False),
        ("ix_schedule_runs_under_way", UNDER_WAY, True),
    ):
        op.create_index(
            name,
            "schedule_runs",
            ["schedule_id"],
            unique=unique,
            sqlite_where=where,
            postgresql_where=where,
        )


def downgrade() -> None:
    op.drop_table("schedule_runs")
    op.drop_table("schedules")
