"""The short form of `make fuzz`, always of the same seed; and that it sees what it looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import PARTS

ROOT = Path(__file__).parents[2]


def fuzz(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.fuzz", "--seed", "5", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=800, cwd=ROOT)


@pytest.mark.parametrize("part", [part for part, (_, short) in PARTS.items() if short])
def test_bad_inputs_do_no_harm(part: str) -> None:
    done = fuzz("--short", part)
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
    assert f"{PARTS[part][1]:,} cases, 0 findings" in done.stdout


PLANTED = """
import contextlib, os, pathlib, time
@contextlib.contextmanager
def opened(data, guard):
    def judge(case):
        case.told = "planted"
        {act}
        return "nothing"
    yield judge
"""


@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("open('ELSEWHERE/x', 'w').close()", "outside of its directory: open"),
        ("pathlib.Path('left').touch()", "outside of its directory: open"),
        ("os.posix_spawn('/bin/true', ['true'], {})", "outside of its directory: os.posix_spawn"),
        ("os.abort()", "its process ended with -6"),
        ("os.environ.clear(); time.sleep(60)", "not done after"),
    ],
)
def test_what_is_planted_is_found(act: str, told: str, tmp_path: Path) -> None:
    module = tmp_path / "tests" / "fuzz" / "planted.py"
    module.parent.mkdir(parents=True)
    module.write_text(PLANTED.format(act=act.replace("ELSEWHERE", str(tmp_path))))
    code = (
        "import sys, tests.fuzz, tests.fuzz.__main__ as m; "
        "here = sys.argv[1]; tests.fuzz.__path__.append(here); m.PARTS['planted'] = (1, 1); "
        "m._APART = 'import tests.fuzz; tests.fuzz.__path__.append(%r); ' % here + m._APART; "
        "sys.argv[1:] = ['planted', '--seed', '5']; sys.exit(m.main())"
    )
    argv = [sys.executable, "-c", code, str(module.parent)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 1, done.stderr[-2_000:]
    assert told in done.stdout
    assert "python -m tests.fuzz planted --seed 5 --case 0" in done.stdout
