"""A store with a blob store beside it, for tests of audits and repairs."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import update

from farm.audit import Audited, audit
from farm.blobs import BlobStore
from farm.pictures import object_key, sha256
from farm.store import audit as store
from farm.store import jobs
from farm.store.jobs import Claim, Picture
from farm.store.tables import counts as counts_table
from tests.store_kit import Kit, spec


class Gallery(Kit):
    """A store with a blob store beside it; a picture is its prompt's bytes."""

    blobs: BlobStore

    @classmethod
    def of(cls, url: str, blobs: BlobStore) -> Gallery:
        gallery = cls.at(url)
        assert isinstance(gallery, cls)
        gallery.blobs = blobs
        return gallery

    def rendered(self, *prompts: str) -> str:
        """A batch that is done, each job with its picture."""
        batch_id = self.batch(*(spec(prompt) for prompt in prompts))
        self.finish(self.claim(batch_id, self.session(), 99))
        return batch_id

    def finish(self, held: list[Claim]) -> None:
        with self.db.write() as connection:
            done = [(claim, self.put(claim)) for claim in held]
            assert len(jobs.succeed(connection, done)) == len(held)

    def put(self, claim: Claim) -> Picture:
        data = claim.spec.prompt.encode()
        key = object_key(claim.ref, claim.claim_no, claim.session_id, "png")
        self.blobs.put(key, data, "image/png")
        hashes = {name: "0" * 64 for name, _ in claim.spec.loras}
        mark = claim.spec.fingerprint("fake", "0" * 64, hashes)
        return Picture(key, sha256(data), len(data), 0.1, mark)

    def linked(self, source: str) -> str:
        """A batch of one job that has the picture of the first job of `source`."""
        batch_id = self.batch(spec("link"))
        (claim,) = self.claim(batch_id, self.session())
        picture = replace(self.store_of(source), render_s=None)
        with self.db.write() as connection:
            jobs.succeed(connection, [(claim, picture)])
        return batch_id

    def store_of(self, batch_id: str) -> Picture:
        (one, *_) = self.pictures(batch_id)
        return Picture(one.object_key, one.sha256, one.size_bytes or 0, 0.1, "f" * 64)

    def pictures(self, batch_id: str) -> list[store.Recorded]:
        with self.db.read() as connection:
            return store.recorded(connection, batch_id, -1, 99)

    def miscount(self, batch_id: str, **wrong: int) -> None:
        with self.db.write() as connection:
            mine = counts_table.c.batch_id == batch_id
            connection.execute(update(counts_table).where(mine).values(**wrong))

    def look(self, *batch_ids: str, **how: bool) -> Audited:
        return audit(self.db, self.blobs, batch_ids or None, **how)  # type: ignore[arg-type]
