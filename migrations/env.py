"""Alembic's environment. The farm hands its own connection over; see farm.store.schema."""

from alembic import context

from farm.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
