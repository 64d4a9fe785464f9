"""Batches, their counters, jobs, events, sessions and API tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("owner", sa.Text(), server_default="", nullable=False),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("total", sa.Integer(), server_default="0", nullable=False),
        sa.Column("ready", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("whole", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("digest", sa.String(length=64), server_default="", nullable=False),
        sa.Column("paused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
        sa.Column("after_id", sa.String(length=16), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("reuse", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("touched_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("request_sha256", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["after_id"], ["batches.id"], name=op.f("fk_batches_after_id"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(
        "ix_batches_open",
        "batches",
        ["owner"],
        unique=False,
        sqlite_where=sa.text("finished_at IS NULL"),
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_index(
        "ix_batches_after",
        "batches",
        ["after_id"],
        unique=False,
        sqlite_where=sa.text("after_id IS NOT NULL"),
        postgresql_where=sa.text("after_id IS NOT NULL"),
    )
    op.create_table(
        "owners",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("max_queued", sa.Integer(), nullable=True),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_owners")),
    )
    op.create_table(
        "turns",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "model", name=op.f("pk_turns")),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    op.create_index("ix_batches_idempotency", "batches", ["owner", "idempotency_key"], unique=True)
    op.create_table(
        "api_tokens",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), server_default="", nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("last_used_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_tokens")),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("engine", sa.String(length=16), nullable=False),
        sa.Column("device", sa.String(length=32), server_default="", nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=True),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=12), server_default="idle", nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.Column("rendered", sa.Integer(), server_default="0", nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("seconds_per_picture", sa.Float(), nullable=True),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("closed_at", sa.Double(), nullable=True),
        sa.Column("lost", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
    )
    op.create_index(
        "ix_sessions_open",
        "sessions",
        ["expires_at"],
        unique=False,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.create_table(
        "batch_counts",
        sa.Column("batch_id", sa.String(length=16), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("asked_engine", sa.String(length=16), server_default="", nullable=False),
        sa.Column("queued", sa.Integer(), server_default="0", nullable=False),
        sa.Column("running", sa.Integer(), server_default="0", nullable=False),
        sa.Column("succeeded", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("cancelled", sa.Integer(), server_default="0", nullable=False),
        sa.Column("claimed_at", sa.Double(), nullable=True),
        sa.CheckConstraint("cancelled >= 0", name=op.f("ck_batch_counts_cancelled_not_negative")),
        sa.CheckConstraint("failed >= 0", name=op.f("ck_batch_counts_failed_not_negative")),
        sa.CheckConstraint("queued >= 0", name=op.f("ck_batch_counts_queued_not_negative")),
        sa.CheckConstraint("running >= 0", name=op.f("ck_batch_counts_running_not_negative")),
        sa.CheckConstraint("succeeded >= 0", name=op.f("ck_batch_counts_succeeded_not_negative")),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_batch_counts_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "model", "asked_engine", name=op.f("pk_batch_counts")),
    )
    op.create_table(
        "batch_inputs",
        sa.Column("key", sa.String(length=80), nullable=False),
        sa.Column("batch_id", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_batch_inputs_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("key", "batch_id", name=op.f("pk_batch_inputs")),
    )
    op.create_index("ix_batch_inputs_batch", "batch_inputs", ["batch_id"], unique=False)
    op.create_table(
        "dropped_objects",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_dropped_objects")),
    )
    op.create_table(
        "job_events",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            sa.Identity(always=False),
            nullable=False,
        ),
        sa.Column("batch_id", sa.String(length=16), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("code", sa.String(length=40), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("session_id", sa.String(length=32), nullable=True),
        sa.Column("claim_no", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_job_events_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index("ix_job_events_job", "job_events", ["batch_id", "idx"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("batch_id", sa.String(length=16), nullable=False),
        sa.Column("idx", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("asked_engine", sa.String(length=16), server_default="", nullable=False),
        sa.Column("key", sa.String(length=16), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("negative_prompt", sa.Text(), server_default="", nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("params", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("state", sa.String(length=9), server_default="queued", nullable=False),
        sa.Column("claim_no", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("session_id", sa.String(length=32), nullable=True),
        sa.Column("engine", sa.String(length=16), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("progress", sa.Float(), server_default="0", nullable=False),
        sa.Column("suspect", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
        sa.Column("not_before", sa.Double(), nullable=True),
        sa.Column("needs_memory", sa.BigInteger(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("object_key", sa.Text(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("size_bytes", sa.Integer(), nullable=True),
        sa.Column("render_s", sa.Float(), nullable=True),
        sa.Column("fingerprint", sa.String(length=64), nullable=True),
        sa.Column("error_code", sa.String(length=40), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(state = 'running') = (session_id IS NOT NULL)",
            name=op.f("ck_jobs_running_has_session"),
        ),
        sa.CheckConstraint(
            "(state IN ('cancelled', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
            name=op.f("ck_jobs_final_has_time"),
        ),
        sa.CheckConstraint(
            "state <> 'failed' OR error_code IS NOT NULL", name=op.f("ck_jobs_failed_has_code")
        ),
        sa.CheckConstraint(
            "state <> 'succeeded' OR (object_key IS NOT NULL AND sha256 IS NOT NULL"
            " AND fingerprint IS NOT NULL)",
            name=op.f("ck_jobs_succeeded_has_object"),
        ),
        sa.CheckConstraint(
            "state IN ('cancelled', 'failed', 'queued', 'running', 'succeeded')",
            name=op.f("ck_jobs_state_known"),
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_jobs_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "idx", name=op.f("pk_jobs")),
    )
    op.create_index(
        "ix_jobs_failed",
        "jobs",
        ["batch_id", "error_code", "idx"],
        unique=False,
        sqlite_where=sa.text("state = 'failed'"),
        postgresql_where=sa.text("state = 'failed'"),
    )
    op.create_index(
        "ix_jobs_ended_badly",
        "jobs",
        ["batch_id", "state", "idx"],
        unique=False,
        sqlite_where=sa.text("state IN ('failed', 'cancelled')"),
        postgresql_where=sa.text("state IN ('failed', 'cancelled')"),
    )
    op.create_index(
        "ix_jobs_fingerprint",
        "jobs",
        ["fingerprint"],
        unique=False,
        sqlite_where=sa.text("state = 'succeeded'"),
        postgresql_where=sa.text("state = 'succeeded'"),
    )
    op.create_index(
        "ix_jobs_linked",
        "jobs",
        ["object_key"],
        unique=False,
        sqlite_where=sa.text("state = 'succeeded' AND render_s IS NULL"),
        postgresql_where=sa.text("state = 'succeeded' AND render_s IS NULL"),
    )
    op.create_index(
        "ix_jobs_held",
        "jobs",
        ["session_id"],
        unique=False,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "ix_jobs_needs_memory",
        "jobs",
        ["model", "asked_engine", "needs_memory"],
        unique=False,
        sqlite_where=sa.text("state = 'queued' AND needs_memory IS NOT NULL"),
        postgresql_where=sa.text("state = 'queued' AND needs_memory IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["batch_id", "model", "asked_engine", "idx"],
        unique=False,
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )


def downgrade() -> None:
    op.drop_table("jobs")
    op.drop_table("batch_counts")
    op.drop_table("sessions")
    op.drop_table("job_events")
    op.drop_table("batch_inputs")
    op.drop_table("dropped_objects")
    op.drop_table("batches")
    op.drop_table("leases")
    op.drop_table("turns")
    op.drop_table("owners")
    op.drop_table("api_tokens")
