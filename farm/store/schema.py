"""Brings a database to the current schema through the Alembic scripts in migrations/."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic.command import upgrade as alembic_upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from farm.store.db import Database

logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
_PACKAGED = Path(__file__).parent.parent / "_migrations"
MIGRATIONS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "migrations"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def head() -> str:
    """The newest revision that this code knows."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def current(db: Database) -> str | None:
    """The database's revision; None when it has no schema yet."""
    with db.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(db: Database, revision: str = "head") -> None:
    """Create or upgrade the schema, in one transaction."""
    config = _config()
    with db.write() as connection:
        config.attributes["connection"] = connection
        alembic_upgrade(config, revision)
