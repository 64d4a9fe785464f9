"""Migrations on data, up and down; and the last release's code on the newest schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text, update

from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.doctor import examine
from farm.errors import DatabaseUnavailable, InvalidConfig, RenderFailed
from farm.service import Farm
from farm.store import batches, jobs, schema, sessions
from farm.store.db import Database
from farm.store.schema import Fit
from farm.store.tables import metadata, schema_floor
from tests.store_kit import LANE, PICTURE, Kit, spec

ROOT = Path(__file__).parents[2]
LAST_RELEASE = "e163f06"  # 0.1.0
FIRST = "0001"
BATCH = "0f9k2m4x7q3w5t8b"
# A row of each kind as code of the first revision writes them.
_JOB = (
    "INSERT INTO jobs (batch_id, idx, model, asked_engine, key, prompt, seed, params, state,"
    " claim_no, failures, session_id, engine, started_at, progress, suspect, cancel_requested,"
    " not_before, needs_memory, finished_at, object_key, sha256, size_bytes, render_s,"
    " fingerprint, error_code, error) VALUES "
)
_FILLED = (
    "INSERT INTO batches (id, params, name, owner, total, ready, whole, created_at, touched_at,"
    f" started_at, finished_at) VALUES ('{BATCH}', '{{\"steps\": 4}}', 'night', 'ann', 6, true,"
    " true, 1.5, 2.5, 3.5, NULL), ('1000000000000000', '{}', '', '', 0, false, false, 1, 1, NULL,"
    f" NULL)",
    f"UPDATE batches SET after_id = '{BATCH}', expires_at = 9 WHERE id = '1000000000000000'",
    "INSERT INTO batch_counts (batch_id, model, asked_engine, queued, running, succeeded, failed,"
    f" cancelled, claimed_at) VALUES ('{BATCH}', 'shapes', '', 1, 1, 2, 1, 1, 4.5)",
    _JOB + f"""
('{BATCH}', 0, 'shapes', '', 'k', 'ein „roter" Kreis', -9, '{{"width": 64}}', 'queued',
  2, 1, NULL, NULL, NULL, 0, true, false, 7.5, 4096, NULL, NULL, NULL, NULL, NULL, NULL,
  'ERR_OUT_OF_MEMORY', 'too little'),
('{BATCH}', 1, 'shapes', '', 'k', 'b', 9223372036854775807, NULL, 'running',
  1, 0, 's1', 'fake', 5.5, 0.25, false, true, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
  NULL, NULL),
('{BATCH}', 2, 'shapes', '', 'k', 'c', 1, NULL, 'succeeded',
  1, 0, NULL, 'fake', 5.5, 1, false, false, NULL, NULL, 6.5, 'pictures/a', 'aa', 10, 0.5, 'ff',
  NULL, NULL),
('{BATCH}', 3, 'shapes', '', 'k', 'c', 1, NULL, 'succeeded',
  3, 2, NULL, 'fake', 5.5, 1, false, false, NULL, NULL, 6.5, 'pictures/a', 'aa', 10, NULL, 'ff',
  NULL, NULL),
('{BATCH}', 4, 'shapes', '', 'k', 'e', 1, NULL, 'failed',
  3, 3, NULL, 'fake', 5.5, 0.75, true, false, NULL, NULL, 6.5, NULL, NULL, NULL, NULL, NULL,
  'ERR_RENDER_FAILED', 'no'),
('{BATCH}', 5, 'shapes', '', 'k', 'f', 1, NULL, 'cancelled',
  0, 0, NULL, NULL, NULL, 0, false, false, NULL, NULL, 6.5, NULL, NULL, NULL, NULL, NULL,
  'ERR_CANCELLED', 'cancelled')""",
    "INSERT INTO job_events (batch_id, idx, at, kind, code, claim_no) VALUES "
    + ", ".join(
        f"('{BATCH}', {i}, {i}.5, '{kind}', 'ERR_X', 1)"
        for i, kind in enumerate(("requeued", "failed", "cancelled", "redriven"))
    ),
    "INSERT INTO sessions (id, model, engine, memory, host, pid, state, info, rendered, opened_at,"
    " heartbeat_at, expires_at, closed_at, lost) VALUES ('s1', 'shapes', 'fake', 4096, 'h', 7,"
    " 'rendering', '{\"cap\": 4}', 2, 1, 2, 3, NULL, false), ('s0', 'shapes', 'fake', NULL, 'h', 6,"
    " 'waiting', '{}', 0, 1, 2, 3, 4, true)",
    "INSERT INTO owners (owner, max_queued) VALUES ('*', 100)",
    "INSERT INTO turns (owner, model, at) VALUES ('ann', 'shapes', 4.5)",
    "INSERT INTO leases (name, holder, expires_at) VALUES ('dispatcher', 'me', 9.5)",
    f"INSERT INTO batch_inputs (key, batch_id) VALUES ('inputs/x', '{BATCH}')",
    "INSERT INTO dropped_objects (key, size_bytes) VALUES ('pictures/z', 10)",
    "INSERT INTO api_tokens (id, name, scopes, sha256, created_at) VALUES ('t', 'n', 'read', 'h',"
    " 1.5)",
)  # fmt: skip


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    db = Database(database_url)
    yield db
    db.close()


@pytest.fixture
def filled(db: Database) -> Database:
    """A database of the first revision with a row of each kind."""
    schema.upgrade(db, FIRST)
    with db.write() as connection:
        for statement in _FILLED:
            connection.exec_driver_sql(statement)
    return db


def _rows(db: Database) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table but Alembic's own, in order."""
    with db.read() as connection:
        names = set(inspect(connection).get_table_names()) - {"alembic_version"}
        found = {
            name: [dict(r._mapping) for r in connection.execute(text(f"SELECT * FROM {name}"))]
            for name in names
        }
    return {name: sorted(rows, key=repr) for name, rows in found.items()}


def _shape(connection: Connection) -> dict[str, Any]:
    """What Alembic's comparison leaves out too: CHECKs, defaults, names of keys and conditions."""
    looks = inspect(connection)
    return {
        name: (
            {(c["name"], c["sqltext"]) for c in looks.get_check_constraints(name)},
            {
                (
                    i["name"],
                    tuple(i["column_names"]),
                    i["unique"],
                    *map(str, i["dialect_options"].values()),
                )
                for i in looks.get_indexes(name)
            },
            looks.get_pk_constraint(name)["name"],
            {(k["name"], k["options"].get("ondelete")) for k in looks.get_foreign_keys(name)},
            {c["name"]: (str(c["type"]), c["default"]) for c in looks.get_columns(name)},
        )
        for name in looks.get_table_names()
        if name != "alembic_version"
    }


def test_rows_outlive_the_way_up_and_down_again(filled: Database) -> None:
    before = _rows(filled)
    assert all(before.values()), "a table without rows proves nothing"
    schema.upgrade(filled)
    after = _rows(filled)
    assert after.pop("schema_floor") == [{"revision": FIRST}]
    assert (after.pop("schedules"), after.pop("schedule_runs")) == ([], [])
    new = {"jobs": {"avoid_session": None}, "sessions": {"spooled": 0}}
    assert after == {
        name: sorted(({**row, **new.get(name, {})} for row in rows), key=repr)
        for name, rows in before.items()
    }
    schema.downgrade(filled, FIRST)
    assert _rows(filled) == before
    schema.upgrade(filled)
    with filled.read() as connection:
        assert batches.status(connection, BATCH).counts["succeeded"] == 2
    schema.downgrade(filled, "base")
    assert schema.fit(filled) is Fit.EMPTY


def test_the_migrated_schema_is_that_of_the_tables(db: Database, tmp_path: Path) -> None:
    """On the way up from nothing, and on the way down to each revision and up again."""
    schema.upgrade(db, FIRST)
    with db.read() as connection:
        first = _shape(connection)
    schema.upgrade(db)
    with db.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        migrated = _shape(connection)
    schema.downgrade(db, FIRST)
    with db.read() as connection:
        assert _shape(connection) == first
    schema.downgrade(db, "base")
    with db.write() as connection:
        metadata.create_all(connection)
    with db.read() as connection:
        assert _shape(connection) == migrated


def test_a_migration_that_fails_leaves_all_as_it_was(filled: Database) -> None:
    with filled.write() as connection:
        connection.exec_driver_sql("UPDATE owners SET max_queued = -1")  # its CHECK is the last
    with filled.read() as connection:
        shape = _shape(connection)
    before = _rows(filled)
    with pytest.raises(InvalidConfig, match=r"limits_not_negative.*mend them, then upgrade again"):
        schema.upgrade(filled)
    assert schema.current(filled) == FIRST
    assert _rows(filled) == before
    with filled.read() as connection:
        assert _shape(connection) == shape
    with filled.write() as connection:
        connection.exec_driver_sql("UPDATE owners SET max_queued = 1")
    schema.upgrade(filled)
    assert schema.fit(filled) is Fit.CURRENT


def test_foreign_keys_hold_after_an_upgrade(filled: Database) -> None:
    """SQLite's are off while tables are made anew, and on again for all who come after."""
    schema.upgrade(filled)
    with filled.write() as connection:
        batches.remove(connection, BATCH)
    left = _rows(filled)
    assert (left["jobs"], left["job_events"], left["batch_counts"]) == ([], [], [])
    assert [batch["after_id"] for batch in left["batches"]] == [None]


def test_two_upgrades_at_once_and_workers_that_go_on(database_url: str) -> None:
    """A farm at work: whoever writes meanwhile waits a little, and nobody's transaction is lost."""
    old = Database(database_url)
    schema.upgrade(old, FIRST)
    stop, troubles, done = threading.Event(), list[str](), [0]

    def work() -> None:
        """What a worker of 0.1.0 does, by statements that both revisions have."""
        db = Database(database_url)
        while not stop.is_set():
            try:
                with db.write() as connection:
                    connection.exec_driver_sql("SELECT id FROM sessions")
                    connection.exec_driver_sql("UPDATE jobs SET progress = 0.5 WHERE idx = -1")
                    connection.exec_driver_sql("SELECT id FROM batches")
                    connection.exec_driver_sql("UPDATE batches SET paused = false WHERE id = ''")
                done[0] += 1
            except DatabaseUnavailable as error:
                troubles.append(error.message)
        db.close()

    workers = [threading.Thread(target=work) for _ in range(3)]
    others = [Database(database_url) for _ in range(2)]
    upgrades = [threading.Thread(target=schema.upgrade, args=[other]) for other in others]
    for thread in (*workers, *upgrades):
        thread.start()
    for thread in upgrades:
        thread.join(60)
    at_the_end = done[0]
    while done[0] == at_the_end:  # they go on, on the new schema
        stop.wait(0.01)
    stop.set()
    for thread in workers:
        thread.join(60)
    assert troubles == []
    assert schema.fit(old) is Fit.CURRENT
    for db in (old, *others):
        db.close()


def test_code_works_on_a_newer_schema_down_to_its_floor(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    schema.upgrade(db)
    url = db.engine.url.render_as_string(hide_password=False)
    with db.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN of_the_future INTEGER")
    assert schema.fit(db) is Fit.NEWER
    with Farm(Settings(database_url=url)) as farm:
        farm.check_schema()
        assert "newer (9999) than this version" in caplog.text
    kit = Kit(db)
    batch, session = kit.batch(spec("a"), spec("b")), kit.session()
    claims = claim_bundle(db, session, LANE, 2)
    with db.write() as connection:
        assert len(jobs.succeed(connection, [(claim, PICTURE) for claim in claims])) == 2
    assert kit.states(batch) == {"succeeded": 2}
    schema.upgrade(db)  # leaves it alone
    assert schema.current(db) == "9999"
    with db.write() as connection:
        connection.execute(update(schema_floor).values(revision="9998"))
    assert schema.fit(db) is Fit.TOO_NEW
    with (
        pytest.raises(InvalidConfig, match="too new for this version"),
        Farm(Settings(database_url=url)) as farm,
    ):
        farm.check_schema()
    with pytest.raises(InvalidConfig, match="too new for this version"):
        schema.upgrade(db)


def test_doctor_tells_a_newer_schema(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    schema.upgrade(db)
    with db.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    url = db.engine.url.render_as_string(hide_password=False)
    (found,) = [one for one in examine(database_url=url) if one.name == "schema"]
    assert (found.verdict, found.message) == (
        "warn", f"revision 9999 is newer than this version's, {schema.head()}",
    )  # fmt: skip


# ---- the last release

_LIFE = """
import json, sys
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.catalog import Lane
from farm.errors import RenderFailed, EngineCrashed, WorkerLost
from farm.pictures import object_key
from farm.reconcile import reconcile
from farm.service import Farm
from farm.states import JobState
from farm.store import jobs, prune, reuse, schema, sessions
from farm.store.jobs import Picture
from farm.verdict import give_back, settle_failure

url, home, made_here = sys.argv[1:]
settings = Settings(database_url=url, home=home, broker_url="redis://127.0.0.1:1/0")
farm = Farm(settings)  # not Farm.open: the released check_schema knows its own revision only
if made_here == "yes":
    schema.upgrade(farm.db)
lane = Lane("shapes", "fake")
batch = farm.submit([f"a {c} circle" for c in "abcdefgh"], seed=1, model="shapes").id
other = farm.submit(["a a circle"], seed=1, model="shapes", after=batch, expires_s=3600.0).id
with farm.db.write() as c:
    session = sessions.open_session(c, lane, 30, host="h", pid=1, device="cpu", info={}, memory=9)
    dead = sessions.open_session(c, lane, -1, host="h", pid=2, device="cpu", info={})

def claim(n, who=session):
    return claim_bundle(farm.db, who, lane, n)

def picture(claim):
    key = object_key(claim.ref, claim.claim_no, "png")
    return Picture(key, "0" * 64, 10, 0.5, claim.spec.fingerprint("fake", "0" * 64))

first, second, third, fourth = claim(4)
with farm.db.write() as c:
    sessions.beat(c, session, 30, sessions.Beat("rendering", "", 1, 0.5, 100))
    jobs.mark_started(c, [first, second])
    jobs.record_progress(c, [(first, 0.5)])
    assert jobs.succeed(c, [(first, picture(first))])
    assert settle_failure(c, second, EngineCrashed("SIGABRT"), settings)
    assert give_back(c, third, "a test")
    assert settle_failure(c, fourth, RenderFailed("no"), Settings(max_failures=1))
claim(2, dead)
assert reconcile(farm.db, settings)
assert farm.cancel(batch, 7)[0] == 1
assert farm.retry(batch) == 1
with farm.db.write() as c:
    assert not sessions.beat(c, dead, 30, sessions.Beat())
while bundle := claim(4):
    if bundle[0].ref.batch_id == other:
        with farm.db.read() as c:
            found = reuse.rendered(c, other, [bundle[0].spec.fingerprint("fake", "0" * 64)])
        with farm.db.write() as c:
            assert reuse.link(c, {bundle[0]: next(iter(found.values()))}) == set()
    else:
        with farm.db.write() as c:
            assert len(jobs.succeed(c, [(one, picture(one)) for one in bundle])) == len(bundle)
with farm.db.write() as c:
    sessions.close(c, session)
told = {name: farm.status(one).counts for name, one in (("batch", batch), ("other", other))}
told["batches"], told["events"] = len(farm.batches()), len(farm.history(second.ref))
with farm.db.write() as c:
    assert prune.step(c, other, 100).jobs == 1
    assert prune.step(c, other, 100).ended
print(json.dumps(told | {"id": batch}))
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last release's own code, out of the history."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", LAST_RELEASE, "farm", "workers", "migrations"],
        capture_output=True, check=False,
    )  # fmt: skip
    if packed.returncode:
        pytest.skip(f"the history has no {LAST_RELEASE}: {packed.stderr.decode()[:100].strip()}")
    home = tmp_path_factory.mktemp("released")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(home, filter="data")
    return home


def _live(released: Path, url: str, home: Path, *, made_here: bool) -> dict[str, Any]:
    """A batch's whole life by the released code, in a process of its own; what it tells."""
    life = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LIFE, url, str(home), "yes" if made_here else "no"],
        cwd=released, env=os.environ | {"PYTHONPATH": str(released)}, timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert life.returncode == 0, life.stderr[-3000:]
    told: dict[str, Any] = json.loads(life.stdout.splitlines()[-1])
    none = {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    assert told["batch"] == {**none, "succeeded": 7, "cancelled": 1}
    assert told["other"] == {**none, "succeeded": 1}
    assert told["events"] >= 1
    return told


@pytest.mark.slow
def test_the_last_release_lives_on_the_newest_schema(
    released: Path, database_url: str, tmp_path: Path
) -> None:
    """Made and used by the release, upgraded, used by both, taken back, used by the release."""
    first = _live(released, database_url, tmp_path, made_here=True)["id"]
    db = Database(database_url)
    assert schema.fit(db) is Fit.OLDER
    schema.upgrade(db)
    second = _live(released, database_url, tmp_path, made_here=False)["id"]
    kit = Kit(db)
    for batch_id in (first, second):
        assert kit.states(batch_id) == {"succeeded": 7, "cancelled": 1}
        with db.write() as connection:
            assert jobs.redrive(connection, batch_id, [jobs.CANCELLED]) == 1
    (claim, *_) = claim_bundle(db, kit.session(), LANE, 1)
    with db.write() as connection:
        jobs.requeue(connection, claim, RenderFailed("no"), count=True, avoid=True)
        sessions.close(connection, claim.session_id)
    with db.write() as connection:
        for batch_id in (first, second):
            jobs.request_cancel(connection, batch_id)
    schema.downgrade(db, FIRST)
    _live(released, database_url, tmp_path, made_here=False)
    db.close()
