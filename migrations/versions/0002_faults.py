"""What outlives faults: where a job failed last, pictures held on a worker's disk, more invariants.

Code of 0001 goes on working: columns are added only, and no row that it writes breaks a CHECK.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# By table and name. On SQLite a table is made anew for them, with its rows.
CHECKS = {
    "batches": {
        "total_not_negative": "total >= 0",
        "whole_is_ready": "NOT whole OR ready",
        "finished_is_whole": "finished_at IS NULL OR whole",
    },
    "jobs": {
        "object_if_succeeded": "(state = 'succeeded') = (object_key IS NOT NULL)",
        "numbers_not_negative": "idx >= 0 AND claim_no >= 0 AND failures >= 0",
        "sizes_not_negative": "size_bytes >= 0 AND render_s >= 0 AND needs_memory >= 0",
        "progress_is_fraction": "progress >= 0 AND progress <= 1",
        "queued_is_unbegun": "state <> 'queued'"
        " OR (engine IS NULL AND started_at IS NULL AND progress = 0)",
        "running_has_claim": "state <> 'running' OR (engine IS NOT NULL AND claim_no > 0)",
        "succeeded_was_claimed": "state <> 'succeeded' OR (engine IS NOT NULL AND claim_no > 0"
        " AND started_at IS NOT NULL AND size_bytes IS NOT NULL AND error_code IS NULL)",
        "failed_has_failures": "state <> 'failed' OR (claim_no > 0 AND failures > 0)",
        "cancelled_has_code": "state <> 'cancelled' OR error_code IS NOT NULL",
    },
    "job_events": {
        "kind_known": "kind IN ('cancelled', 'failed', 'redriven', 'repaired', 'requeued')",
    },
    "sessions": {
        "state_known": "state IN ('idle', 'rendering', 'resting', 'waiting')",
        "lost_is_closed": "NOT lost OR closed_at IS NOT NULL",
        "figures_not_negative": "rendered >= 0 AND stored_bytes >= 0 AND spooled >= 0"
        " AND memory >= 0 AND seconds_per_picture >= 0",
    },
    "owners": {"limits_not_negative": "max_queued >= 0 AND max_running >= 0"},
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("avoid_session", sa.String(length=32), nullable=True))
    op.add_column(
        "sessions", sa.Column("spooled", sa.Integer(), server_default="0", nullable=False)
    )
    floor = op.create_table(
        "schema_floor",
        sa.Column("revision", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_schema_floor")),
    )
    op.bulk_insert(floor, [{"revision": "0001"}])
    for table, checks in CHECKS.items():
        named = {op.f(f"ck_{table}_{name}"): check for name, check in checks.items()}
        if op.get_bind().dialect.name == "postgresql":  # one look at its rows for all of them
            added = ", ".join(f"ADD CONSTRAINT {name} CHECK ({c})" for name, c in named.items())
            op.execute(f"ALTER TABLE {table} {added}")
            continue
        with op.batch_alter_table(table) as batch:
            for name, check in named.items():
                batch.create_check_constraint(name, check)


def downgrade() -> None:
    for table, checks in CHECKS.items():
        with op.batch_alter_table(table) as batch:
            for name in checks:
                batch.drop_constraint(op.f(f"ck_{table}_{name}"), type_="check")
            if table == "sessions":
                batch.drop_column("spooled")
            if table == "jobs":
                batch.drop_column("avoid_session")
    op.drop_table("schema_floor")
