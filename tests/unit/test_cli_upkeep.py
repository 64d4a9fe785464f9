"""`farm audit` and `farm reconcile` on SQLite and a local directory: words, JSON, exit codes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.audit import Audited
from farm.blobs import BlobStore
from farm.service import Farm
from farm.units import show_size
from tests.cli_kit import Run, command_line
from tests.gallery_kit import Gallery
from tests.store_kit import spec


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    with command_line(tmp_path / "home", monkeypatch, capsys) as call:
        monkeypatch.setenv("FARM_BROKER_URL", f"redis+socket://{tmp_path}/nobody.sock")
        yield call


@pytest.fixture
def shop(run: Run) -> Iterator[Gallery]:
    with Farm.open() as farm:
        farm.check_schema()
        shop = Gallery(farm.db)
        shop.blobs = farm.blobs
        yield shop


def test_all_is_well(run: Run, shop: Gallery) -> None:
    batch_id = shop.rendered("a", "bb", "ccc")
    code, out, err = run("audit")
    assert (code, out) == (0, "")
    size = show_size(sum(found.size for found in shop.blobs.list("pictures/")))
    assert f"all is well: 3 pictures of 1 batch, {size} read, 3 objects listed" in err
    code, out, _ = run("audit", batch_id, "--quick", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["ok"], told["pictures"], told["bytes"], told["wrong"]) == (True, 3, 0, {})
    assert json.loads(run("audit", "--after", batch_id, "--json")[1])["pictures"] == 0


def test_what_is_wrong_is_told_with_how_to_mend_it(run: Run, shop: Gallery) -> None:
    batch_id = shop.rendered("a", "b")
    shop.blobs.delete([shop.pictures(batch_id)[1].object_key])
    shop.miscount(batch_id, failed=7)
    code, out, err = run("audit", "latest")
    assert code == 1
    assert f"missing   job {batch_id}/1: its picture" in out
    assert f"counters  the counters of batch {batch_id} are wrong: shapes: failed 7, not 0" in out
    assert "wrong: 2; looked at 2 pictures of 1 batch" in err
    assert "mend: farm reconcile" in err
    assert "farm audit --lost FILE, then farm submit --file FILE --no-reuse" in err
    code, out, _ = run("audit", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["wrong"]) == (1, False, {"counters": 1, "missing": 1})
    assert {finding["about"] for finding in told["findings"]} == {batch_id, f"{batch_id}/1"}


def test_lost_pictures_are_submitted_again(run: Run, shop: Gallery, tmp_path: Path) -> None:
    """Every field of theirs, so that the new picture is the one that was lost."""
    rich = spec(
        "ein Ölbild", init_image=f"inputs/{'a' * 64}.png", strength=0.5, loras={"ink": 0.5},
        scheduler="euler", negative_prompt="x", format="webp",
    )  # fmt: skip
    whole, lossy = shop.rendered("a"), shop.batch(rich, spec("kept"))
    shop.finish(shop.claim(lossy, shop.session(), 9))
    shop.blobs.delete([shop.pictures(lossy)[0].object_key])
    file = tmp_path / "lost.jsonl"
    assert run("audit", "--quick", "--lost", file)[0] == 1
    (row,) = map(json.loads, file.read_text("utf-8").splitlines())
    shop.blobs.put(f"inputs/{'a' * 64}.png", b"1", "image/png")
    assert row.pop("init_image") == f"blob:inputs/{'a' * 64}.png"
    assert spec(**row, init_image=rich.init_image) == rich
    assert run("audit", "--lost", file)[0] == 2
    fine = tmp_path / "fine.jsonl"
    assert run("audit", whole, "--lost", fine)[0] == 0
    assert not fine.exists()


def test_what_is_refused(run: Run, shop: Gallery) -> None:
    batch_id = shop.rendered("a")
    assert run("audit", batch_id, "--after", batch_id)[0] == 2
    assert run("audit", "zzz")[0] == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_counts_and_a_stop_says_where_to_go_on(
    run: Run, shop: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = shop.rendered("a"), shop.rendered("b", "c")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert run("audit")[0] == 0
    assert "3/3" in screen.getvalue()

    def stop(db: object, blobs: BlobStore, chosen: object, **how: object) -> Audited:
        how["progress"](Audited(last=first))  # type: ignore[operator]
        raise KeyboardInterrupt

    monkeypatch.setattr("farm.audit.audit", stop)
    assert run("audit")[0] == 130
    assert f"stopped; go on with: farm audit --after {first}" in screen.getvalue()
    assert first < second


def test_reconcile_says_what_it_would_do_then_does_it(run: Run, shop: Gallery) -> None:
    batch_id = shop.batch(spec("held"))
    shop.claim(batch_id, shop.session(ttl_s=-1.0))
    shop.miscount(shop.rendered("a"), failed=7)
    code, out, _ = run("reconcile", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["dry_run"]
    assert [one["kind"] for one in told["repairs"]] == ["session", "counters"]
    assert shop.look().wrong == {"counters": 1, "held": 1}
    code, out, _ = run("reconcile", "-h")
    assert "Safe" in out
    code, out, err = run("reconcile")
    assert "expired; jobs of it go back: 1" in out
    assert "shapes: failed 7, not 0" in out
    assert "expired" not in err, "nothing is told twice"
    assert shop.look().ok


def test_reconcile_without_a_broker_does_the_rest_and_says_so(run: Run, shop: Gallery) -> None:
    batch_id = shop.batch(spec("waits"))
    shop.session()
    code, _, err = run("reconcile")
    assert code == 1
    assert "not looked at:" in err
    assert "nobody.sock" in err or "Redis" in err
    assert shop.states(batch_id) == {"queued": 1}
